//! Perplexity on the workers: windows are cut into shares, each share evaluated whole by one worker.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_common::calibration::TokenBlock;
use espalier_common::checkpoint::Checkpoint;
use espalier_common::config;
use espalier_common::digest::Digest;
use espalier_common::ids::{Lease, RunId, Unit};
use espalier_common::job::EvaluationSpec;
use espalier_common::report::{Artifact, Outcome};
use espalier_common::store::{self, BlobStore};
use espalier_common::wire::Source;
use espalier_gate::trace::TraceId;

use crate::calibration;
use crate::driver::{Driver, Preparation, Purpose};
use crate::error::RunError;
use crate::events::{Phase, RunEvent};
use crate::fleet::{Help, UnitCall};
use crate::journal::{EvaluatedModel, Journal, JournalError, JournalRecord};
use crate::run::{Setting, wait_for_workers};
use crate::schedule::{Record, Scheduler, Shape};
use crate::trace::UnitSpans;

/// Puts a token block into a store under its digest.
///
/// # Errors
/// What the store says.
pub fn put_block(store: &dyn BlobStore, block: &TokenBlock) -> Result<Artifact, RunError> {
    let bytes = block.to_bytes();
    let sha256 = block.digest();
    let name = format!("tokens/{sha256}.bin");
    store.put(&name, &bytes)?;
    Ok(Artifact { name, sha256, bytes: bytes.len() as u64 })
}

/// The windows that a specification asks for.
///
/// # Errors
/// What the text or the tokenizer says.
pub fn windows(spec: &EvaluationSpec, model: &dyn Checkpoint) -> Result<TokenBlock, RunError> {
    let source = config::open_text(&spec.source)?;
    Ok(calibration::windows(source.path(), model, spec.sequence_length, spec.max_windows)?)
}

/// How the windows of an evaluation were cut in an earlier life of the run, if they were.
pub fn shares_before(model: EvaluatedModel, past: &[JournalRecord], windows: usize) -> Option<u32> {
    let recorded = past.iter().find_map(|record| match record {
        JournalRecord::Shared { model: shared, shares } if *shared == model => Some(*shares),
        _ => None,
    });
    // Journals of earlier versions do not say; there the first share tells, once it is committed.
    let committed = || {
        past.iter().find_map(|record| match record {
            JournalRecord::Evaluate {
                model: evaluated,
                record: Record::Committed { lease, outcome: Outcome::Evaluated { window_nll, .. } },
            } if *evaluated == model && lease.unit == Unit::Evaluate(model.first_share()) => {
                Some(windows.div_ceil(window_nll.len().max(1)) as u32)
            }
            _ => None,
        })
    };
    recorded.or_else(committed)
}

/// One share a worker, but never more than windows.
pub fn shares_for(workers: usize, windows: usize) -> u32 {
    workers.clamp(1, windows.max(1)) as u32
}

/// What the driver needs to know of an evaluation.
pub struct Evaluation {
    /// Which of a run's models it is.
    pub model: EvaluatedModel,
    /// Where that model is.
    pub uri: String,
    /// The windows.
    pub tokens: Artifact,
    /// The store that they are in.
    pub run_url: String,
    /// Number of windows.
    pub windows: u32,
    /// Number of shares.
    pub shares: u32,
}

impl Purpose for Evaluation {
    fn record(&self, record: Record) -> JournalRecord {
        JournalRecord::Evaluate { model: self.model, record }
    }

    fn call(&self, lease: Lease, _: Source, _: bool, _: Help) -> UnitCall {
        let share = match lease.unit {
            Unit::Evaluate(share) => share - self.model.first_share(),
            Unit::Forward(layer) | Unit::Prune(layer) => layer.0,
        };
        // Consecutive windows, so that the shares in order are the windows in order.
        let size = self.windows.div_ceil(self.shares);
        let windows = (share * size..((share + 1) * size).min(self.windows)).collect();
        let (model, tokens, run_url) = (self.uri.clone(), self.tokens.clone(), self.run_url.clone());
        UnitCall::Evaluate { model, tokens, run_url, windows }
    }

    fn preparation(&self) -> Option<Preparation> {
        None
    }
}

/// What an evaluation found, and what it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Digest of the windows' tokens.
    pub tokens: Digest,
    /// The negative log-likelihood of each window, in nats, summed over its targets.
    pub window_nll: Vec<f64>,
    /// Seconds of forward passes, loading the layers included: of the worker that took longest.
    pub seconds: f64,
    /// Highest resident memory of a worker.
    pub peak_rss_bytes: u64,
}

/// An evaluation that belongs to no run.
pub struct Standalone {
    uri: String,
    block: TokenBlock,
    store: Arc<dyn BlobStore>,
}

impl Standalone {
    /// Reads the text and checks the model's files.
    ///
    /// # Errors
    /// What the model, the text or the tokenizer says.
    pub fn open(model: &str, spec: &EvaluationSpec, store: Arc<dyn BlobStore>) -> Result<Self, RunError> {
        let checkpoint = config::open_model(model)?;
        let block = windows(spec, checkpoint.as_ref())?;
        // Workers may have another working directory.
        let uri = if store::is_object_url(model) {
            model.to_owned()
        } else {
            let path = checkpoint.path().clone();
            std::path::absolute(&path).unwrap_or(path).to_string_lossy().into_owned()
        };
        Ok(Self { uri, block, store })
    }

    /// Evaluates every window once.
    ///
    /// # Errors
    /// See [`RunError`].
    pub async fn execute(self, setting: &Setting) -> Result<Measured, RunError> {
        wait_for_workers(setting).await?;
        let count = self.block.sequences();
        let phase = Phase::EvaluateAlone { windows: count };
        setting.events.note(RunEvent::Phase { phase });
        let shares = shares_for(setting.roster.members().len(), count);
        let block = put_block(self.store.as_ref(), &self.block)?;
        let tokens = block.sha256;
        let span = setting.tracer.begin(TraceId::random(), "evaluation").with("espalier.model", self.uri.clone());
        let purpose = Evaluation {
            model: EvaluatedModel::Dense,
            uri: self.uri,
            tokens: block,
            run_url: self.store.url().to_owned(),
            windows: count as u32,
            shares,
        };
        let run = RunId("evaluation".to_owned());
        let mut driver = Driver {
            run: &run,
            roster: &setting.roster,
            journal: &mut Forgetful,
            events: &setting.events,
            clock: setting.clock.as_ref(),
            alike: !setting.workers_return,
            stop: &setting.stop,
            committed: BTreeMap::new(),
            stored: BTreeMap::new(),
            store: Arc::clone(&self.store),
            trace: UnitSpans::of_stage(&span, "evaluate"),
        };
        let scheduler =
            Scheduler::new(Shape::Evaluate { first: EvaluatedModel::Dense.first_share(), shares }, setting.limits);
        let outcomes = driver.drive(scheduler, Arc::new(purpose)).await;
        span.close(outcomes.as_ref().map(drop));
        let outcomes = outcomes?;
        let mut measured = Measured { tokens, window_nll: Vec::new(), seconds: 0.0, peak_rss_bytes: 0 };
        for outcome in outcomes.into_values() {
            if let Outcome::Evaluated { window_nll, phases } = outcome {
                measured.window_nll.extend(window_nll);
                let seconds = phases.iter().filter(|phase| phase.phase == "evaluate").map(|phase| phase.seconds).sum();
                // Shares run side by side: the slowest one counts.
                measured.seconds = measured.seconds.max(seconds);
            }
        }
        let peaks = setting.roster.everyone().into_values().map(|member| member.peak_rss_bytes);
        measured.peak_rss_bytes = peaks.max().unwrap_or(0);
        Ok(measured)
    }
}

/// An evaluation of its own takes minutes and leaves nothing behind: there is nothing to resume.
struct Forgetful;

impl Journal for Forgetful {
    fn append(&mut self, _: &JournalRecord) -> Result<(), JournalError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::ids::{Attempt, WorkerId};

    use super::*;

    /// Two shares of five windows; the second was committed before the coordinator died.
    #[test]
    fn a_run_with_other_workers_cuts_its_windows_as_before() {
        let model = EvaluatedModel::Pruned;
        let lease = |share| Lease {
            unit: Unit::Evaluate(model.first_share() + share),
            worker: WorkerId(1),
            attempt: Attempt(1),
        };
        let record = |record| JournalRecord::Evaluate { model, record };
        let outcome = Outcome::Evaluated { window_nll: vec![1.0; 2], phases: Vec::new() };
        let second = record(Record::Committed { lease: lease(1), outcome });
        let past = [JournalRecord::Shared { model, shares: 2 }, record(Record::Leased { lease: lease(0) }), second];
        assert_eq!(shares_before(model, &past, 5), Some(2));
        assert_eq!(shares_before(EvaluatedModel::Dense, &past, 5), None);
        let outcome = Outcome::Evaluated { window_nll: vec![1.0; 3], phases: Vec::new() };
        let first = record(Record::Committed { lease: lease(0), outcome });
        assert_eq!(shares_before(model, &[first], 5), Some(2), "a journal of an earlier version");
        assert_eq!((shares_for(3, 5), shares_for(9, 5), shares_for(0, 0)), (3, 5, 1));
    }
}
