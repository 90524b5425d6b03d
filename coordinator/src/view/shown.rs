//! What is shown of a run: plain data, the same for the page, its frozen copy and the terminal.

use std::collections::{BTreeMap, VecDeque};

use espalier_common::ids::{Unit, WorkerId};
use serde::{Deserialize, Serialize};

use super::LogLine;
use crate::events::About;
use crate::report::Perplexity;

/// How a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It waits for its turn.
    #[default]
    Queued,
    /// It goes on.
    Running,
    /// It ended well.
    Done,
    /// It ended badly.
    Failed,
}

/// What fits on one screen of a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Head {
    /// How it is.
    pub state: State,
    /// Why it ended badly.
    pub reason: Option<String>,
    /// The exit code that this amounts to.
    pub exit_code: Option<u8>,
    /// What is computed.
    pub about: Option<About>,
    /// The run's own name.
    pub run: Option<String>,
    /// Where its journal and artifacts are.
    pub url: Option<String>,
    /// When it was opened, in milliseconds since 1970.
    pub started: Option<u64>,
    /// When it ended.
    pub ended: Option<u64>,
    /// When the last layer will be pruned, if the rest takes as long as those so far.
    pub eta: Option<u64>,
    /// What it is at, and what it was at.
    pub phases: Vec<PhaseSpan>,
    /// Steps done of the last of them.
    pub phase_done: usize,
    /// Layers in all, once that is known.
    pub layers: Option<usize>,
    /// Layers committed.
    pub committed: usize,
    /// Of these, in an earlier life of the run.
    pub committed_before: usize,
    /// Kinds of sublayers, in dataflow order.
    pub kinds: Vec<String>,
    /// Zeros so far.
    pub zeros: u64,
    /// Weights of the layers so far.
    pub elements: u64,
    /// Seconds of work by phase, summed over workers.
    pub seconds_by_phase: BTreeMap<String, f64>,
    /// Floating-point operations of matrix products by phase.
    pub flops_by_phase: BTreeMap<String, f64>,
    /// Leases that came to nothing.
    pub retries: u64,
    /// Assistants that were given up on in the middle of a layer.
    pub assistants_lost: u64,
    /// Workers that were lost.
    pub workers_lost: u64,
    /// Hidden states that went from worker to worker, once that is known.
    pub bytes_moved: Option<u64>,
    /// Wall-clock seconds, all lives added, once it ended well.
    pub seconds: Option<f64>,
    /// Perplexity before and after, once it is known.
    pub perplexity: Option<Perplexity>,
}

/// A phase, and when it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseSpan {
    /// What people call it.
    pub title: String,
    /// Steps in all; 0 if that is not known.
    pub total: usize,
    /// When it began, in milliseconds since 1970.
    pub from: u64,
    /// When it ended.
    pub to: Option<u64>,
}

/// A committed layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerCells {
    /// Index of the layer.
    pub layer: u32,
    /// Who pruned it.
    pub worker: WorkerId,
    /// When it was committed, if that is known, in milliseconds since 1970.
    pub at: Option<u64>,
    /// Its sublayers, in dataflow order.
    pub cells: Vec<Cell>,
}

/// A sublayer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// `q_proj`.
    pub kind: String,
    /// Relative error on the calibration inputs.
    pub error: f64,
    /// The same on held-out ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
    /// Share of zeros.
    pub sparsity: f64,
    /// Seconds of solving.
    pub seconds: f64,
}

/// What a worker did for a while.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Who.
    pub worker: WorkerId,
    /// `prune`, `forward`, `evaluate`, `survey`, `try`, or `assist`.
    pub kind: String,
    /// Index of the layer, or of the share of windows or the plan.
    pub index: u32,
    /// When it began, in milliseconds since 1970.
    pub from: u64,
    /// When it ended, if it did.
    pub to: Option<u64>,
    /// `done`, `failed`, `lost`, or `stopped` with the run; empty until it ends.
    pub end: String,
    /// What it belongs to.
    pub(super) unit: Unit,
}

/// A worker of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lane {
    /// Its number.
    pub worker: WorkerId,
    /// Its name.
    pub name: String,
    /// Whether it is there.
    pub here: bool,
    /// What it is doing in its unit: `solve`.
    pub doing: Option<String>,
    /// Steps of that done.
    pub done: u32,
    /// Steps of that in all.
    pub total: u32,
}

/// The end of a list that only grows, with how much of it is gone.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tail<T> {
    most: usize,
    gone: usize,
    pub(super) kept: VecDeque<T>,
}

impl<T: Clone> Tail<T> {
    pub(super) fn new(most: usize) -> Self {
        Self { most, gone: 0, kept: VecDeque::new() }
    }

    pub(super) fn push(&mut self, item: T) {
        if self.kept.len() == self.most {
            self.kept.pop_front();
            self.gone += 1;
        }
        self.kept.push_back(item);
    }

    pub(super) fn since(&self, cursor: &mut usize) -> Part<T> {
        let from = (*cursor).clamp(self.gone, self.gone + self.kept.len());
        *cursor = self.gone + self.kept.len();
        Part { from, items: self.kept.iter().skip(from - self.gone).cloned().collect() }
    }
}

/// The rest of a list: whoever has items before `from` keeps those and drops what follows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part<T> {
    /// Place of the first item in the whole list.
    pub from: usize,
    /// The items.
    pub items: Vec<T>,
}

/// How much of a run somebody has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    pub(super) epoch: u64,
    pub(super) layers: usize,
    pub(super) spans: usize,
    pub(super) log: usize,
}

/// What somebody who has seen a run up to a cursor has not seen; everything, for a new cursor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Always whole.
    pub head: Head,
    /// Committed layers, in the order in which they were.
    pub layers: Part<LayerCells>,
    /// Bars of the timeline that are over.
    pub spans: Part<Span>,
    /// Those that are not, always whole.
    pub open: Vec<Span>,
    /// The log.
    pub log: Part<LogLine>,
    /// The workers, always whole.
    pub workers: Vec<Lane>,
}

/// What a journal does not tell: when things happened. Kept beside the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    pub(super) started: Option<u64>,
    pub(super) ended: Option<u64>,
    pub(super) phases: Vec<PhaseSpan>,
    pub(super) spans: Vec<Span>,
    pub(super) log: Vec<LogLine>,
    pub(super) workers: Vec<Lane>,
    /// By layer.
    pub(super) committed: BTreeMap<u32, u64>,
}
