//! `report.json`: a pure function of the journal.

mod allocation;

use std::collections::BTreeMap;

use espalier_common::digest::Digest;
use espalier_common::ids::{RunId, Unit, WorkerId};
use espalier_common::job::{JobError, JobSpec, Propagation};
use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::{LayerSurvey, LinkUse, Outcome, PhaseSeconds, Reconstruction, SublayerReport};
use espalier_common::structure::{Kept, Structure};
use serde::{Deserialize, Serialize};

pub use self::allocation::{AllocatedLayer, AllocationReport, Trial};
use crate::journal::{EvaluatedModel, JournalRecord, WorkerTotals};
use crate::plan::strategy::Choice;
use crate::run::survey::{candidate_depths, trial_losses};
use crate::schedule::Record;

/// The report of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The run.
    pub run: RunId,
    /// What was pruned.
    pub model: ModelReport,
    /// How.
    pub method: MethodReport,
    /// To what, over the whole model.
    pub pattern: Pattern,
    /// On which inputs.
    pub propagation: Propagation,
    /// How the workers shared them, and why so; of several lives of the run, the last. Earlier versions did not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Choice>,
    /// With which tokens.
    pub calibration: CalibrationReport,
    /// Every sublayer, in dataflow order.
    pub sublayers: Vec<SublayerEntry>,
    /// What stays of the layers, if heads and channels were removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structured: Option<StructuredReport>,
    /// How sparsity is spread over the layers, if not evenly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<AllocationReport>,
    /// Sums.
    pub totals: Totals,
    /// If it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<Perplexity>,
    /// Where the checkpoint is.
    pub output: String,
    /// Digest of every file of the checkpoint.
    pub files: BTreeMap<String, Digest>,
}

/// What was pruned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// As the job names it.
    pub source: String,
    /// Digest of the model's files as the fingerprint has it.
    pub fingerprint: Digest,
    /// Its family.
    pub family: String,
    /// Number of layers.
    pub layers: usize,
}

/// How it was pruned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodReport {
    /// The method.
    pub name: String,
    /// Its parameters, defaults filled in.
    pub params: serde_json::Value,
    /// Its version.
    pub version: String,
}

/// With which tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// Digest of the token block.
    pub sha256: Digest,
    /// Number of sequences.
    pub samples: usize,
    /// Of these, held out.
    pub held_out: usize,
    /// Tokens in each.
    pub sequence_length: usize,
}

/// One sublayer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SublayerEntry {
    /// Index of its layer.
    pub layer: u32,
    /// Full tensor name.
    pub name: String,
    /// ‖W'X̂ − Y‖² / ‖Y‖², after the cast to the stored type. Y is the dense weight's outputs WX̂ on the same inputs, or the dense
    /// model's WX for methods that look at those: see `SublayerReport`.
    pub rel_error: f64,
    /// The same on held-out tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_error: Option<f64>,
    /// Share of zeros.
    pub sparsity: f64,
    /// Zeros.
    pub zeros: u64,
    /// Weights.
    pub elements: u64,
    /// Seconds of solving.
    pub seconds: f64,
    /// Iterations.
    pub iterations: u32,
    /// Share of the mean diagonal added to the gram.
    pub damping: f64,
    /// How often damping had to be raised.
    pub damping_raised: u32,
    /// Input channels that were never active.
    pub dead_channels: u32,
    /// The target blend α that was taken, if one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Who solved it.
    pub worker: WorkerId,
    /// How its half of the layer was tuned afterwards, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconstruction: Option<Reconstruction>,
}

/// What a structured method removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StructuredReport {
    /// Parameters of the layers' linear maps before.
    pub parameters: u64,
    /// Of these, removed.
    pub removed: u64,
    /// The share that is.
    pub share: f64,
    /// Every layer.
    pub layers: Vec<StructuredEntry>,
}

/// What stays of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StructuredEntry {
    /// Index of the layer.
    pub layer: u32,
    /// Blocks of attention that stay, if any were to go: KV heads, or what `[pattern] attention` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<Vec<u32>>,
    /// Number of channels that stay.
    pub channels: u64,
    /// Parameters removed.
    pub removed: u64,
}

/// Sums over the run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Share of zeros in the pruned matrices.
    pub sparsity: f64,
    /// Wall-clock seconds, all processes' lives added.
    pub seconds: f64,
    /// Seconds of work by phase, summed over workers; `journal` is the coordinator's.
    pub seconds_by_phase: BTreeMap<String, f64>,
    /// Floating-point operations of matrix products by phase.
    pub flops_by_phase: BTreeMap<String, f64>,
    /// What each worker computed on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub device_by_worker: BTreeMap<String, String>,
    /// Speed of its matrix products in GFLOP/s, as each worker measured it when it started or was told: what `plan` asks for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gflops_by_worker: BTreeMap<String, f64>,
    /// Highest resident memory of each worker.
    pub peak_rss_bytes_by_worker: BTreeMap<String, u64>,
    /// Highest resident memory of the coordinator.
    pub coordinator_peak_rss_bytes: u64,
    /// Bytes of tensors that went from worker to worker.
    pub bytes_moved: u64,
    /// Leases that came to nothing: their unit was leased again.
    pub retries: u64,
    /// Assistants that were given up on in the middle of a layer; its owner did their part itself.
    #[serde(default)]
    pub assistants_lost: u64,
    /// What joined the owners of layers with their assistants, and how often.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<LinkTotal>,
}

/// How often something joined the owner of a layer with an assistant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkTotal {
    /// What it was, and why nothing faster.
    #[serde(flatten)]
    pub link: LinkUse,
    /// How often: once a layer and assistant.
    pub times: u64,
}

/// Perplexity before and after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Of the source.
    pub dense: f64,
    /// Of the output.
    pub pruned: f64,
    /// Tokens in each window.
    pub sequence_length: usize,
    /// Number of windows.
    pub windows: usize,
}

/// exp of the mean negative log-likelihood per predicted token: windows of `sequence_length` tokens have one target fewer.
///
/// Source: the SparseGPT and Wanda evaluation (each window's mean over its targets counts the same).
pub fn perplexity(window_nll: &[f64], sequence_length: usize) -> f64 {
    let targets = (window_nll.len() * (sequence_length - 1)) as f64;
    (window_nll.iter().sum::<f64>() / targets).exp()
}

/// Why a journal gives no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// The run did not get that far.
    #[error("the journal has no record that the run was {0}")]
    Unfinished(&'static str),
}

/// Makes the report out of a run's journal.
///
/// # Errors
/// `Unfinished` if the run was not created, planned or assembled.
pub fn build(records: &[JournalRecord]) -> Result<Report, ReportError> {
    let mut facts = Facts::default();
    for record in records {
        facts.take(record);
    }
    let losses = trial_losses(records, facts.job.map_or(0, |job| candidate_depths(job).len()));
    facts.into_report(&losses)
}

#[derive(Default)]
struct Facts<'a> {
    job: Option<&'a JobSpec>,
    run: Option<&'a RunId>,
    model_fingerprint: Option<Digest>,
    tokens: Option<Digest>,
    outline: Option<&'a ModelOutline>,
    patterns: &'a [Pattern],
    strategy: Option<&'a Choice>,
    surveys: BTreeMap<u32, &'a LayerSurvey>,
    sublayers: BTreeMap<u32, Vec<SublayerEntry>>,
    kept: BTreeMap<u32, &'a Kept>,
    nll: BTreeMap<EvaluatedModel, BTreeMap<u32, &'a [f64]>>,
    files: Option<&'a BTreeMap<String, Digest>>,
    totals: Totals,
    eval_sequence_length: usize,
}

impl<'a> Facts<'a> {
    fn take(&mut self, record: &'a JournalRecord) {
        match record {
            JournalRecord::TakenOver(_) | JournalRecord::Computing { .. } => {}
            JournalRecord::Created(created) => {
                self.job = Some(&created.job);
                self.run = Some(&created.run);
                self.tokens = Some(created.tokens.sha256);
                self.model_fingerprint = Some(created.model_fingerprint);
                self.eval_sequence_length = created.job.evaluation.as_ref().map_or(0, |spec| spec.sequence_length);
            }
            JournalRecord::Planned { outline, patterns } => (self.outline, self.patterns) = (Some(outline), patterns),
            JournalRecord::Shared { .. } => {}
            JournalRecord::Strategy(choice) => self.strategy = Some(choice),
            JournalRecord::Survey(record) => self.take_survey(record),
            JournalRecord::Prune(record) => self.take_pruning(record),
            JournalRecord::Evaluate { model, record } => {
                self.count_lease(record);
                if let Record::Committed { lease, outcome: Outcome::Evaluated { window_nll, phases } } = record
                    && let Unit::Evaluate(share) = lease.unit
                {
                    self.nll.entry(*model).or_default().insert(share, window_nll);
                    self.add_phases(phases);
                }
            }
            JournalRecord::Workers(WorkerTotals {
                peak_rss_bytes,
                devices,
                gflops,
                bytes_received,
                coordinator_peak_rss_bytes,
            }) => {
                self.totals.device_by_worker.extend(devices.clone());
                self.totals.gflops_by_worker.extend(gflops.clone());
                for (name, bytes) in peak_rss_bytes {
                    let peak = self.totals.peak_rss_bytes_by_worker.entry(name.clone()).or_default();
                    *peak = (*peak).max(*bytes);
                }
                self.totals.bytes_moved = self.totals.bytes_moved.max(*bytes_received);
                self.totals.coordinator_peak_rss_bytes =
                    self.totals.coordinator_peak_rss_bytes.max(*coordinator_peak_rss_bytes);
            }
            JournalRecord::Assembled { files } => self.files = Some(files),
            JournalRecord::Finished { seconds, journal_seconds }
            | JournalRecord::Stopped { seconds, journal_seconds, .. } => {
                self.totals.seconds += seconds;
                *self.totals.seconds_by_phase.entry("journal".to_owned()).or_default() += journal_seconds;
            }
        }
    }

    fn take_survey(&mut self, record: &'a Record) {
        self.count_lease(record);
        let Record::Committed { lease, outcome } = record else { return };
        let (Outcome::Surveyed { phases, .. } | Outcome::Evaluated { phases, .. }) = outcome else { return };
        if let (Unit::Forward(layer), Outcome::Surveyed { survey, .. }) = (lease.unit, outcome) {
            self.surveys.insert(layer.0, survey);
        }
        // All of it is one phase: what allocating cost on top of pruning.
        *self.totals.seconds_by_phase.entry("survey".to_owned()).or_default() +=
            phases.iter().map(|phase| phase.seconds).sum::<f64>();
        *self.totals.flops_by_phase.entry("survey".to_owned()).or_default() +=
            phases.iter().map(|phase| phase.flops).sum::<f64>();
    }

    fn take_pruning(&mut self, record: &'a Record) {
        self.count_lease(record);
        match record {
            Record::Committed {
                lease,
                outcome: Outcome::Pruned { sublayers, kept, phases, assistants_lost, links, .. },
            } => {
                self.totals.assistants_lost += u64::from(*assistants_lost);
                links.iter().for_each(|link| self.count_link(link));
                self.add_phases(phases);
                if let Unit::Prune(layer) = lease.unit {
                    self.kept.extend(kept.as_ref().map(|kept| (layer.0, kept)));
                    let entries = sublayers.iter().map(|sublayer| entry(layer.0, lease.worker, sublayer)).collect();
                    self.sublayers.insert(layer.0, entries);
                }
            }
            Record::Committed { outcome: Outcome::Forwarded { phases }, .. } => self.add_phases(phases),
            Record::Committed { .. } | Record::Leased { .. } | Record::Failed { .. } => {}
        }
    }

    fn count_link(&mut self, link: &LinkUse) {
        match self.totals.links.iter_mut().find(|total| total.link == *link) {
            Some(total) => total.times += 1,
            None => self.totals.links.push(LinkTotal { link: link.clone(), times: 1 }),
        }
    }

    /// A lease that is not followed by its commit came to nothing, whether a fault was reported or nobody was left to.
    fn count_lease(&mut self, record: &Record) {
        match record {
            Record::Leased { .. } => self.totals.retries += 1,
            Record::Committed { .. } => self.totals.retries = self.totals.retries.saturating_sub(1),
            Record::Failed { .. } => {}
        }
    }

    fn add_phases(&mut self, phases: &[PhaseSeconds]) {
        for phase in phases {
            *self.totals.seconds_by_phase.entry(phase.phase.clone()).or_default() += phase.seconds;
            *self.totals.flops_by_phase.entry(phase.phase.clone()).or_default() += phase.flops;
        }
    }

    fn perplexity(&self) -> Option<Perplexity> {
        let of = |model| {
            let windows: Vec<f64> = self.nll.get(&model)?.values().flat_map(|nll| nll.iter().copied()).collect();
            (!windows.is_empty()).then(|| (perplexity(&windows, self.eval_sequence_length), windows.len()))
        };
        let (dense, windows) = of(EvaluatedModel::Dense)?;
        let (pruned, _) = of(EvaluatedModel::Pruned)?;
        Some(Perplexity { dense, pruned, sequence_length: self.eval_sequence_length, windows })
    }

    fn into_report(mut self, losses: &[f64]) -> Result<Report, ReportError> {
        let job = self.job.ok_or(ReportError::Unfinished("created"))?;
        let outline = self.outline.ok_or(ReportError::Unfinished("planned"))?;
        let files = self.files.ok_or(ReportError::Unfinished("assembled"))?.clone();
        let perplexity = self.perplexity();
        let allocation = allocation::report(job, outline, self.patterns, &self.surveys, losses);
        let sublayers: Vec<SublayerEntry> = std::mem::take(&mut self.sublayers).into_values().flatten().collect();
        let structured = outline.structure.as_ref().map(|structure| structured(structure, &self.kept));
        let sum = |count: fn(&SublayerEntry) -> u64| sublayers.iter().map(count).sum::<u64>() as f64;
        self.totals.sparsity = sum(|entry| entry.zeros) / sum(|entry| entry.elements).max(1.0);
        Ok(Report {
            run: self.run.ok_or(ReportError::Unfinished("created"))?.clone(),
            model: ModelReport {
                source: job.model.source.clone(),
                fingerprint: self.model_fingerprint.ok_or(ReportError::Unfinished("created"))?,
                family: outline.family.clone(),
                layers: outline.layers.len(),
            },
            method: MethodReport {
                name: job.method.name.clone(),
                params: outline.method_params.clone(),
                version: outline.method_version.clone(),
            },
            pattern: overall_pattern(job, outline).map_err(|_| ReportError::Unfinished("created from a valid job"))?,
            propagation: job.propagation.mode,
            strategy: self.strategy.cloned(),
            calibration: CalibrationReport {
                sha256: self.tokens.ok_or(ReportError::Unfinished("created"))?,
                samples: job.calibration.samples,
                held_out: job.held_out_samples(),
                sequence_length: job.calibration.sequence_length,
            },
            sublayers,
            structured,
            allocation,
            totals: self.totals,
            perplexity,
            output: job.output.uri.clone(),
            files,
        })
    }
}

/// What is asked of the zeros of the whole model.
///
/// # Errors
/// If the job's pattern is none.
pub fn overall_pattern(job: &JobSpec, outline: &ModelOutline) -> Result<Pattern, JobError> {
    Ok(match job.pattern()? {
        _ if outline.imports_zeros => Pattern::Imported,
        pattern if outline.structure.is_some() => Pattern::Parameters { share: pattern.sparsity() },
        pattern => pattern,
    })
}

fn structured(structure: &Structure, kept: &BTreeMap<u32, &Kept>) -> StructuredReport {
    let layers: Vec<StructuredEntry> = (0..)
        .zip(&structure.layers)
        .filter_map(|(layer, pairs)| {
            let kept = kept.get(&layer)?;
            Some(StructuredEntry {
                layer,
                attention: kept.attention.clone(),
                channels: kept.channels.len() as u64,
                removed: kept.removed(pairs) as u64,
            })
        })
        .collect();
    let parameters = structure.layers.iter().map(|layer| layer.parameters as u64).sum::<u64>();
    let removed = layers.iter().map(|layer| layer.removed).sum::<u64>();
    StructuredReport { parameters, removed, share: removed as f64 / parameters.max(1) as f64, layers }
}

/// A sublayer as reports have it.
pub(crate) fn entry(layer: u32, worker: WorkerId, sublayer: &SublayerReport) -> SublayerEntry {
    SublayerEntry {
        layer,
        name: sublayer.tensor.clone(),
        rel_error: sublayer.rel_error,
        held_out_error: sublayer.held_out_error,
        sparsity: sublayer.zeros as f64 / sublayer.elements.max(1) as f64,
        zeros: sublayer.zeros,
        elements: sublayer.elements,
        seconds: sublayer.seconds,
        iterations: sublayer.iterations,
        damping: sublayer.damping,
        damping_raised: sublayer.damping_raised,
        dead_channels: sublayer.dead_channels,
        alpha: sublayer.alpha,
        worker,
        reconstruction: sublayer.reconstruction,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_guessing_has_the_vocabulary_as_perplexity() {
        let nll = 7.0 * 50f64.ln();
        assert!((perplexity(&[nll, nll], 8) - 50.0).abs() < 1e-9);
    }
}
