//! The records of a run. New kinds may be added; a record that is in the golden journals never changes its meaning.

use std::collections::BTreeMap;

use espalier_common::digest::Digest;
use espalier_common::ids::RunId;
use espalier_common::job::JobSpec;
use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::Artifact;
use serde::{Deserialize, Serialize};

use super::fenced::{Appended, TakenOver};
use crate::plan::strategy::Choice;
use crate::schedule::Record;

/// The record that makes a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunCreated {
    /// The run.
    pub run: RunId,
    /// The job, whole.
    pub job: JobSpec,
    /// The calibration tokens.
    pub tokens: Artifact,
    /// Digest of the model's files, see `fingerprint`.
    pub model_fingerprint: Digest,
    /// Seconds since 1970.
    pub created: u64,
}

/// One record of a run's journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JournalRecord {
    /// On an object store: a coordinator writes from here on, and none that wrote before. A local journal is locked instead.
    TakenOver(TakenOver),
    /// The run exists.
    Created(Box<RunCreated>),
    /// The model was inspected and each layer was given its pattern.
    Planned {
        /// What the model is made of.
        outline: ModelOutline,
        /// One pattern a layer.
        patterns: Vec<Pattern>,
    },
    /// What the run is computed with, in all its lives.
    Computing {
        /// As workers call it when they register.
        instruction_set: String,
    },
    /// How the workers share the calibration from here on.
    Strategy(Choice),
    /// The survey of the dense model, or a trial of a plan, moved on: what sparsities are allocated by.
    Survey(Record),
    /// Pruning moved on.
    Prune(Record),
    /// The windows of an evaluation were cut into so many shares; every life of the run cuts them the same way.
    Shared {
        /// Which model is evaluated.
        model: EvaluatedModel,
        /// How many.
        shares: u32,
    },
    /// Evaluation of `dense` or `pruned` moved on.
    Evaluate {
        /// Which model.
        model: EvaluatedModel,
        /// What happened.
        record: Record,
    },
    /// The sparse checkpoint is complete and visible.
    Assembled {
        /// Digest of every file.
        files: BTreeMap<String, Digest>,
    },
    /// What the workers measured of themselves, cumulative.
    Workers(WorkerTotals),
    /// The run ended well.
    Finished {
        /// Wall-clock seconds of this process' part.
        seconds: f64,
        /// Of these, spent on appending to the journal; journals of earlier versions do not tell.
        #[serde(default)]
        journal_seconds: f64,
    },
    /// The run was given up, for now or for good.
    Stopped {
        /// One line for people.
        reason: String,
        /// Wall-clock seconds of this process' part.
        seconds: f64,
        /// Of these, spent on appending to the journal; journals of earlier versions do not tell.
        #[serde(default)]
        journal_seconds: f64,
        /// The exit code that this amounts to; journals of earlier versions do not tell.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<u8>,
    },
}

impl Appended for JournalRecord {
    fn taking_over(taken: TakenOver) -> Self {
        Self::TakenOver(taken)
    }

    fn as_taken_over(&self) -> Option<&TakenOver> {
        match self {
            Self::TakenOver(taken) => Some(taken),
            _ => None,
        }
    }
}

/// What the processes of a run measured of themselves.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct WorkerTotals {
    /// Highest resident memory, by worker name.
    pub peak_rss_bytes: BTreeMap<String, u64>,
    /// What each worker computed on, by worker name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<String, String>,
    /// Speed of its matrix products in GFLOP/s as it was offered, by worker name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gflops: BTreeMap<String, f64>,
    /// Hidden states received from other workers, summed.
    pub bytes_received: u64,
    /// Highest resident memory of the coordinator.
    pub coordinator_peak_rss_bytes: u64,
}

/// Which of the two models of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvaluatedModel {
    /// The source.
    Dense,
    /// The output.
    Pruned,
}

impl EvaluatedModel {
    /// Index of the model's first share of windows, so that no lease fits both evaluations of a run.
    pub fn first_share(self) -> u32 {
        match self {
            Self::Dense => 0,
            Self::Pruned => 1 << 16,
        }
    }
}
