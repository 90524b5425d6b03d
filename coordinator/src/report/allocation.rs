//! The report's part on how sparsity was spread over the layers.

use std::collections::BTreeMap;

use espalier_common::job::{Allocation, JobSpec};
use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::LayerSurvey;
use serde::{Deserialize, Serialize};

use crate::plan::measured;
use crate::run::survey::candidate_depths;

/// How sparsity is spread over the layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocationReport {
    /// By which rule.
    pub rule: Allocation,
    /// Every layer.
    pub layers: Vec<AllocatedLayer>,
    /// The plans that were tried, with `measured`; the first treats all layers alike.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<Trial>,
}

/// One layer's share of the zeros.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocatedLayer {
    /// Index of the layer.
    pub layer: u32,
    /// Share of zeros it was to get.
    pub sparsity: f64,
    /// What the survey found out about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub survey: Option<LayerSurvey>,
}

/// A plan that was tried with a cheap pruner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its depth weight γ; absent for the one that treats all layers alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth_weight: Option<f64>,
    /// Perplexity on the calibration sequences kept apart; absent if it is no number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Whether it was chosen.
    pub chosen: bool,
}

/// What was allocated and by what; `None` if every layer is pruned alike, or by heads and channels, which the report tells of
/// elsewhere.
pub(super) fn report(
    job: &JobSpec,
    outline: &ModelOutline,
    patterns: &[Pattern],
    surveys: &BTreeMap<u32, &LayerSurvey>,
    losses: &[f64],
) -> Option<AllocationReport> {
    let rule = job.pattern.allocation;
    if rule == Allocation::Uniform || outline.structure.is_some() {
        return None;
    }
    let layer = |(layer, pattern): (u32, &Pattern)| AllocatedLayer {
        layer,
        sparsity: pattern.sparsity(),
        survey: surveys.get(&layer).copied().cloned(),
    };
    let targets = job.trial_samples() * job.calibration.sequence_length.saturating_sub(1).max(1);
    let best = measured::best(losses);
    let trial = |(index, depth_weight): (usize, Option<f64>)| Trial {
        depth_weight,
        perplexity: losses.get(index).map(|loss| (loss / targets as f64).exp()).filter(|value| value.is_finite()),
        chosen: index == best,
    };
    let depths = if rule == Allocation::Measured { candidate_depths(job) } else { Vec::new() };
    Some(AllocationReport {
        rule,
        layers: (0..).zip(patterns).map(layer).collect(),
        trials: depths.into_iter().enumerate().map(trial).collect(),
    })
}
