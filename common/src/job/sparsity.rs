//! `[pattern]`: what goes, and how it is spread over layers.

use serde::{Deserialize, Serialize};

use super::JobError;
use crate::structure::AttentionUnit;

/// Depth weights that may be tried: each costs a forward pass.
const MOST_DEPTHS: usize = 32;

/// How sparsity is spread over layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Allocation {
    /// The same in every layer.
    #[default]
    Uniform,
    /// More in later layers, along a logarithm (SlimGPT's, for methods that remove heads and channels).
    Log,
    /// Less in layers with many outlying weights (OWL).
    Owl,
    /// Where it costs least: equal slopes of measured error curves, weighted by depth as held-out tokens say.
    Measured,
}

impl Allocation {
    /// Whether the dense model has to be looked at before sparsities are known.
    pub fn needs_survey(self) -> bool {
        matches!(self, Self::Owl | Self::Measured)
    }
}

/// `[pattern]`: exactly one of `sparsity` and `nofm`; 50 % if neither. For methods that remove heads and channels, sparsity
/// is the share of the layers' parameters that goes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatternSpec {
    /// Share of zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// `"2:4"`: 2 kept of every 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nofm: Option<String>,
    /// How sparsity is spread over layers.
    #[serde(default)]
    pub allocation: Allocation,
    /// How much sparser one layer may be than another: with `log` the last than the first, with `owl` (2λ) the one with
    /// fewest outliers than the one with most, with `measured` the bounds, of which two fifths lie above the mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_spread: Option<f64>,
    /// `owl`, `measured`: at most this many calibration sequences are looked at beforehand; 32 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_samples: Option<usize>,
    /// `owl`: a weight whose score is more than this many times its layer's mean is an outlier (the paper's M); 5 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outliers_above: Option<f64>,
    /// `measured`: the depth weights γ that are tried; 0, 0.01 … 0.08 if absent. A layer's error counts exp(−γ · its index).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth_weights: Option<Vec<f64>>,
    /// Methods that remove heads: what goes at a time; KV heads if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<AttentionUnit>,
    /// Methods that remove channels: as many stay as are a multiple of this; if absent, of 8, which kernels are made for, and
    /// of what the layout and tensor parallelism ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_to: Option<usize>,
    /// Methods that remove heads: KV heads that every layer loses, each with its query heads; chosen if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
}

impl PatternSpec {
    /// `allocation_spread`, or what is usual: OWL's 2λ; for `measured`, 0.15 below and 0.1 above the mean.
    pub fn spread(&self) -> f64 {
        self.allocation_spread.unwrap_or(if self.allocation == Allocation::Measured { 0.25 } else { 0.16 })
    }

    /// `outliers_above`, or what is usual.
    pub fn outlier_multiple(&self) -> f64 {
        self.outliers_above.unwrap_or(5.0)
    }

    /// `depth_weights`, or nine that reach from none to one that leaves the last of 30 layers a tenth of the first's.
    pub fn depth_grid(&self) -> Vec<f64> {
        self.depth_weights.clone().unwrap_or_else(|| (0..9_u8).map(|step| f64::from(step) / 100.0).collect())
    }

    pub(super) fn check_allocation(&self) -> Result<(), JobError> {
        let Self { nofm, allocation, allocation_spread, allocation_samples, outliers_above, depth_weights, .. } = self;
        let unused = [
            ("[pattern] allocation_spread", allocation_spread.is_some() && *allocation == Allocation::Uniform),
            ("[pattern] allocation_samples", allocation_samples.is_some() && !allocation.needs_survey()),
            ("[pattern] outliers_above", outliers_above.is_some() && *allocation != Allocation::Owl),
            ("[pattern] depth_weights", depth_weights.is_some() && *allocation != Allocation::Measured),
        ];
        if let Some((key, _)) = unused.into_iter().find(|(_, unused)| *unused) {
            return Err(JobError::AllocationUnused { key });
        }
        if let Some(nofm) = nofm.as_ref().filter(|_| *allocation != Allocation::Uniform) {
            return Err(JobError::FixedPattern { nofm: nofm.clone() });
        }
        if let Some(value) = allocation_spread.filter(|spread| !(0.0..1.0).contains(spread)) {
            return Err(JobError::ShareOutOfRange { key: "[pattern] allocation_spread", value });
        }
        if let Some(value) = outliers_above.filter(|multiple| !(*multiple > 0.0 && multiple.is_finite())) {
            return Err(JobError::NotPositive { key: "[pattern] outliers_above", value });
        }
        let depths = depth_weights.as_deref().unwrap_or_default();
        if depth_weights.is_some() && !(1..=MOST_DEPTHS).contains(&depths.len()) {
            return Err(JobError::DepthWeights { count: depths.len(), most: MOST_DEPTHS });
        }
        if let Some(value) = depths.iter().copied().find(|depth| !(0.0..=1.0).contains(depth)) {
            return Err(JobError::ShareOutOfRange { key: "[pattern] depth_weights", value });
        }
        Ok(())
    }
}
