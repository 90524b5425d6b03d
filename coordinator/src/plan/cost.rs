//! What a layer costs: bytes, memory and floating-point operations, from its outline alone.
//!
//! Every figure is a count of the products that are done, not a fit to a measurement; what is left out (norms,
//! activations, masks, copying) is small beside them for the layers of any real model.

use espalier_common::calibration::LEAVES;
use espalier_common::job::{JobSpec, Propagation};
use espalier_common::outline::{LayerOutline, ModelOutline, SublayerOutline};
use serde::Serialize;

use super::cluster::Solver;

/// Bytes of an f32.
const F32: u64 = 4;
/// Bytes of an f64.
const F64: u64 = 8;

/// What a worker needs for the largest layer, by what it needs it for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Memory {
    /// The layer's weights in f32, twice: as they were and as they become.
    pub weights_bytes: u64,
    /// Gram matrix of its widest input (and the cross product with the dense inputs, where the method compares them), one
    /// factor of it, and the sums that it comes from: half matrices in f64, four at a time.
    pub gram_bytes: u64,
    /// Hidden states of one sequence as they pass the layer: what must be in memory however small the budget is.
    pub sequence_bytes: u64,
    /// Hidden states of all calibration sequences; what does not fit goes to the scratch folder.
    pub activation_bytes: u64,
}

impl Memory {
    /// What cannot go to disk.
    pub fn resident_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.gram_bytes).saturating_add(self.sequence_bytes)
    }

    /// The larger of both, part by part.
    pub fn max(self, other: Self) -> Self {
        Self {
            weights_bytes: self.weights_bytes.max(other.weights_bytes),
            gram_bytes: self.gram_bytes.max(other.gram_bytes),
            sequence_bytes: self.sequence_bytes.max(other.sequence_bytes),
            activation_bytes: self.activation_bytes.max(other.activation_bytes),
        }
    }
}

/// What one layer costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerCost {
    /// Bytes to read from the checkpoint.
    pub load_bytes: u64,
    /// Operations of running all tokens through it once, all streams.
    pub forward_flops: f64,
    /// Operations of its gram matrices.
    pub gram_flops: f64,
    /// Operations of solving its sublayers.
    pub solve_flops: f64,
    /// Operations of measuring the error of each solution.
    pub verify_flops: f64,
    /// Bytes of what it becomes.
    pub store_bytes: u64,
    /// Memory it takes.
    pub memory: Memory,
}

/// What a job costs on a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobCost {
    /// Layer by layer.
    pub layers: Vec<LayerCost>,
    /// Bytes of the hidden states at one boundary.
    pub boundary_bytes: u64,
    /// Whether idle workers help with a layer of a chain: not where a method needs all its sequences in one place.
    pub is_shared: bool,
    /// As many workers may have a share of the sequences.
    pub most_hands: usize,
}

/// Counts what `job` costs on a model of this outline.
pub fn count(outline: &ModelOutline, job: &JobSpec, solver: Solver) -> JobCost {
    let two_streams = outline.needs_dense && job.propagation.mode == Propagation::Pruned;
    let size = Size {
        samples: job.calibration.samples as u64,
        sequence: job.calibration.sequence_length as u64,
        hidden: outline.hidden_size as u64,
        streams: if two_streams { 2 } else { 1 },
        sides: if job.held_out_samples() > 0 { 2 } else { 1 },
    };
    let layers = outline.layers.iter().map(|layer| size.layer(layer, solver)).collect();
    JobCost {
        layers,
        boundary_bytes: size.boundary_bytes(),
        is_shared: outline.structure.is_none() && !outline.needs_whole,
        most_hands: most_hands(job),
    }
}

/// As many workers may have a share of the calibration sequences: no more than leaves, and none of them without a sequence.
pub fn most_hands(job: &JobSpec) -> usize {
    LEAVES.min(job.calibration.samples).max(1)
}

#[derive(Debug, Clone, Copy)]
struct Size {
    samples: u64,
    sequence: u64,
    hidden: u64,
    streams: u64,
    /// Inputs that errors are measured on: those of the calibration, and those that are held out.
    sides: u64,
}

impl Size {
    fn tokens(self) -> f64 {
        self.samples as f64 * self.sequence as f64
    }

    fn sequence_bytes(self) -> u64 {
        self.sequence.saturating_mul(self.hidden).saturating_mul(F32 * self.streams)
    }

    fn boundary_bytes(self) -> u64 {
        self.sequence_bytes().saturating_mul(self.samples)
    }

    /// Bytes of the sums that are merged as a tree: as many as it is deep, and the one that is being summed.
    fn partial_sums(self, width: u64) -> u64 {
        let half = width.saturating_mul(width.saturating_add(1)) / 2;
        // Both grams are symmetric, the cross product is not.
        let numbers = half.saturating_mul(if self.streams == 2 { 4 } else { 1 });
        numbers.saturating_mul(F64 * (1 + u64::from(LEAVES.ilog2())) * self.sides)
    }

    fn layer(self, layer: &LayerOutline, solver: Solver) -> LayerCost {
        let weights: u64 = layer.sublayers().map(|sublayer| sublayer.elements() as u64).sum();
        let (tokens, streams) = (self.tokens(), self.streams as f64);
        // Scores and weighted sums, causal: half of 2 · 2 · sequence · width a token.
        let attention = 2.0 * tokens * self.sequence as f64 * self.hidden as f64;
        let widths = || layer.groups.iter().filter_map(|group| group.first()).map(|first| first.columns as f64);
        // A symmetric product is done by halves; a cross product is not, and comes on top.
        let a_gram = if self.streams == 2 { 4.0 } else { 1.0 };
        let gram_flops = widths().map(|width| a_gram * tokens * width * width).sum();
        // Factor, inverse and the inverse's factor of each gram: a third, two thirds and a third of columns³.
        let factors: f64 = widths().map(|width| 4.0 / 3.0 * width.powi(3)).sum();
        let sweep = |sublayer: &SublayerOutline| 2.0 * sublayer.elements() as f64 * sublayer.columns as f64;
        let sweeps: f64 = layer.sublayers().map(sweep).sum();
        let widest = layer.sublayers().map(|sublayer| sublayer.columns as u64).max().unwrap_or(0);
        let matrix = widest.saturating_mul(widest).saturating_mul(F32);
        LayerCost {
            load_bytes: layer.bytes,
            forward_flops: streams * (2.0 * tokens * weights as f64 + attention),
            gram_flops,
            solve_flops: factors + solver.sweeps * sweeps,
            // Two energies of half a sweep each; against dense inputs, three and a whole one.
            verify_flops: self.sides as f64 * sweeps * if self.streams == 2 { 2.5 } else { 1.0 },
            store_bytes: layer.bytes,
            memory: Memory {
                weights_bytes: weights.saturating_mul(2 * F32),
                gram_bytes: matrix.saturating_mul(1 + self.streams).saturating_add(self.partial_sums(widest)),
                sequence_bytes: self.sequence_bytes().saturating_mul(2),
                activation_bytes: self.boundary_bytes().saturating_mul(2),
            },
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::plan) fn outline(layers: usize) -> ModelOutline {
        let sublayer = |name: &str, rows, columns| SublayerOutline {
            tensor: name.to_owned(),
            rows,
            columns,
            dtype: "BF16".to_owned(),
        };
        let layer = LayerOutline {
            groups: vec![vec![sublayer("q", 64, 64)], vec![sublayer("up", 256, 64)], vec![sublayer("down", 64, 256)]],
            bytes: 73_728,
        };
        ModelOutline {
            family: "llama".to_owned(),
            layers: vec![layer; layers],
            hidden_size: 64,
            vocabulary_size: 1000,
            max_sequence_length: None,
            other_bytes: 0,
            method_version: "1".to_owned(),
            method_params: serde_json::Value::Null,
            structure: None,
            needs_dense: false,
            imports_zeros: false,
            needs_whole: false,
        }
    }

    pub(in crate::plan) fn job(mode: &str) -> JobSpec {
        serde_json::from_value(serde_json::json!({
            "model": {"source": "m"},
            "calibration": {"source": "c", "samples": 10, "sequence_length": 32},
            "propagation": {"mode": mode},
            "output": {"uri": "o"},
        }))
        .unwrap()
    }

    #[test]
    fn a_layer_is_counted_product_by_product() {
        let cost = count(&outline(1), &job("pruned"), Solver::default());
        let layer = cost.layers[0];
        let (tokens, weights) = (320.0, 64.0 * 64.0 + 2.0 * 256.0 * 64.0);
        assert!((layer.forward_flops - (2.0 * tokens * weights + 2.0 * tokens * 32.0 * 64.0)).abs() < 1.0);
        assert!((layer.gram_flops - tokens * (2.0 * 64.0 * 64.0 + 256.0 * 256.0)).abs() < 1.0);
        assert_eq!(layer.memory.weights_bytes, weights as u64 * 8);
        assert_eq!(layer.memory.gram_bytes, 2 * 256 * 256 * 4 + 4 * 256 * 257 / 2 * 8);
        let sweeps = 64.0 * 64.0 * 64.0 + 256.0 * 64.0 * 64.0 + 64.0 * 256.0 * 256.0;
        assert!((layer.verify_flops - 2.0 * sweeps).abs() < 1.0);
        assert_eq!(cost.boundary_bytes, 320 * 64 * 4);
    }

    #[test]
    fn a_second_stream_doubles_the_forward_and_only_in_a_chain() {
        let cost = |mode, two| {
            let outline = ModelOutline { needs_dense: two, ..outline(1) };
            count(&outline, &job(mode), Solver::default())
        };
        let (one, two) = (cost("pruned", false), cost("pruned", true));
        assert!((two.layers[0].forward_flops / one.layers[0].forward_flops - 2.0).abs() < 1e-12);
        assert_eq!(two.boundary_bytes, 2 * one.boundary_bytes);
        assert_eq!(cost("dense", true), cost("dense", false));
    }
}
