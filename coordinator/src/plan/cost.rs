//! What a layer costs: bytes, memory and floating-point operations, from its outline alone.
//!
//! Products are counted, and what is allocated for them; what is left out (norms, activations, masks, copying) is small beside
//! them for the layers of any real model. What a method takes is what the worker that made the outline says of it.

use espalier_common::calibration::{LEAVES, Split};
use espalier_common::job::{JobSpec, Propagation};
use espalier_common::outline::{Effort, LayerOutline, ModelOutline, SublayerOutline};
use serde::Serialize;

use super::cluster::Solver;
use super::memory::Room;

/// Bytes of an f32.
pub(super) const F32: u64 = 4;
/// Bytes of an f64.
pub(super) const F64: u64 = 8;

/// What one group of sublayers costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupCost {
    /// Rows of each member.
    pub rows: Vec<u64>,
    /// Operations of its gram matrix.
    pub gram_flops: f64,
    /// What solving takes.
    pub effort: Effort,
    /// Bytes of the sums over some of the sequences, as they go from worker to worker.
    pub sums_bytes: u64,
    /// Bytes of the statistics that are solved with, as they go to assistants.
    pub statistics_bytes: u64,
    /// Bytes of the pruned weights as stored.
    pub stored_bytes: u64,
}

impl GroupCost {
    /// Weights of all members.
    pub fn weights(&self) -> u64 {
        self.rows.iter().sum::<u64>().saturating_mul(self.effort.columns as u64)
    }

    /// Bytes of the upper triangle of a matrix as wide as the group's inputs.
    pub fn triangle_bytes(&self) -> u64 {
        let columns = self.effort.columns as u64;
        columns.saturating_mul(columns.saturating_add(1)) / 2 * F32
    }

    /// Rows of the blocks that it is solved by.
    pub fn blocks(&self) -> impl Iterator<Item = u64> {
        let most = self.effort.block_rows as u64;
        self.rows.iter().flat_map(move |&rows| {
            let blocks = if most == 0 { 1 } else { rows.div_ceil(most).max(1) };
            (0..blocks).map(move |block| rows * (block + 1) / blocks - rows * block / blocks)
        })
    }

    /// Operations of solving it, whoever does what.
    pub fn solve_flops(&self) -> f64 {
        let Effort { common_flops, parts, part_flops, row_flops, .. } = self.effort;
        let rows: u64 = self.rows.iter().sum();
        common_flops as f64 + parts as f64 * part_flops as f64 + rows as f64 * row_flops as f64
    }

    /// Bytes that a layer's owner and `assistants` send each other so that all can solve, if they do: statistics to each, parts to
    /// all but whoever made them, and what assistants solved, their share of the weights.
    pub fn solving_bytes(&self, assistants: u64) -> u64 {
        if !self.effort.is_shared || self.blocks().count() < 2 {
            return 0;
        }
        let letters = assistants.saturating_mul(
            self.statistics_bytes.saturating_add((self.effort.parts as u64).saturating_mul(self.triangle_bytes())),
        );
        letters.saturating_add(self.weights().saturating_mul(F32).saturating_mul(assistants) / (1 + assistants))
    }
}

/// What one layer costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerCost {
    /// Bytes to read from the checkpoint.
    pub load_bytes: u64,
    /// Operations of running all tokens through it once, one stream of them.
    pub forward_flops: f64,
    /// Streams of hidden states before and behind it.
    pub streams: u64,
    /// Its groups, in the order in which they are solved.
    pub groups: Vec<GroupCost>,
    /// Operations of measuring the error of each solution.
    pub verify_flops: f64,
    /// Bytes of what it becomes.
    pub store_bytes: u64,
    /// What goes into the memory that it takes.
    pub room: Room,
}

impl LayerCost {
    /// Operations of its gram matrices.
    pub fn gram_flops(&self) -> f64 {
        self.groups.iter().map(|group| group.gram_flops).sum()
    }

    /// Operations of solving its sublayers.
    pub fn solve_flops(&self) -> f64 {
        self.groups.iter().map(GroupCost::solve_flops).sum()
    }
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
    let lanes = if outline.needs_dense { 2 } else { 1 };
    let samples = job.calibration.samples;
    let split =
        Split { sequences: samples, calibrating: samples - job.held_out_samples().min(samples.saturating_sub(1)) };
    let size = Size {
        samples: job.calibration.samples as u64,
        sequence: job.calibration.sequence_length as u64,
        hidden: outline.hidden_size as u64,
        streams: if job.propagation.mode == Propagation::Pruned { lanes } else { 1 },
        lanes,
        split,
    };
    let effort = |columns: usize| {
        let told = outline.efforts.iter().find(|effort| effort.columns == columns).copied();
        let mut effort = told.unwrap_or_else(|| one_sweep(columns));
        if let Some(sweeps) = solver.sweeps {
            effort.row_flops = (sweeps * 2.0 * (columns as f64).powi(2)) as u64;
        }
        if let Some(efficiency) = solver.efficiency {
            effort.speed_percent = (efficiency * 100.0) as u32;
        }
        effort
    };
    let mut layers: Vec<LayerCost> = outline.layers.iter().map(|layer| size.layer(layer, effort)).collect();
    if job.propagation.mode == Propagation::Pruned {
        let ahead: Vec<u64> = layers.iter().skip(1).map(|next| next.room.weights).collect();
        layers.iter_mut().zip(ahead).for_each(|(layer, ahead)| layer.room.weights_ahead = ahead);
    }
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

/// What is reckoned with where no worker has said what the method takes: SparseGPT's.
fn one_sweep(columns: usize) -> Effort {
    let square = (columns as u64).saturating_mul(columns as u64);
    Effort {
        columns,
        common_flops: square.saturating_mul(columns as u64).saturating_mul(4) / 3,
        row_flops: square.saturating_mul(2),
        speed_percent: 40,
        kept_bytes: square.saturating_mul(3 * F32),
        row_bytes: 3 * F32 * columns as u64,
        is_shared: true,
        ..Effort::default()
    }
}

#[derive(Debug, Clone, Copy)]
struct Size {
    samples: u64,
    sequence: u64,
    hidden: u64,
    /// Hidden states at a boundary: in a chain, dense ones beside the others where a method compares them.
    streams: u64,
    /// Those inside a layer that is pruned: wherever it gets its input from, what its groups become sets the two apart.
    lanes: u64,
    split: Split,
}

impl Size {
    fn tokens(self) -> f64 {
        self.samples as f64 * self.sequence as f64
    }

    /// Bytes of something so wide for every token, in so many copies.
    fn bytes_of(self, width: u64, copies: u64) -> u64 {
        self.samples.saturating_mul(self.sequence).saturating_mul(width).saturating_mul(F32 * copies)
    }

    fn boundary_bytes(self) -> u64 {
        self.bytes_of(self.hidden, self.streams)
    }

    /// Numbers that the sums over some of the sequences are, in f64.
    fn sums_bytes(self, width: u64) -> u64 {
        let half = width.saturating_mul(width.saturating_add(1)) / 2;
        // Both grams are symmetric, the cross product is not.
        half.saturating_mul(if self.lanes == 2 { 4 } else { 1 }).saturating_mul(F64)
    }

    fn group(self, members: &[SublayerOutline], effort: Effort) -> GroupCost {
        let columns = effort.columns as u64;
        // A symmetric product is done by halves; a cross product is not, and comes on top.
        let a_gram = if self.lanes == 2 { 4.0 } else { 1.0 };
        let stored =
            |sublayer: &SublayerOutline| (sublayer.elements() as u64).saturating_mul(bytes_of(&sublayer.dtype));
        GroupCost {
            rows: members.iter().map(|sublayer| sublayer.rows as u64).collect(),
            gram_flops: a_gram * self.tokens() * (columns as f64).powi(2),
            effort,
            sums_bytes: self.sums_bytes(columns),
            statistics_bytes: self.sums_bytes(columns) / 2 * self.split.sides() as u64,
            stored_bytes: members.iter().map(stored).sum(),
        }
    }

    fn layer(self, layer: &LayerOutline, effort: impl Fn(usize) -> Effort) -> LayerCost {
        let weights: u64 = layer.sublayers().map(|sublayer| sublayer.elements() as u64).sum();
        let tokens = self.tokens();
        // Scores and weighted sums, causal: half of 2 · 2 · sequence · width a token.
        let attention = 2.0 * tokens * self.sequence as f64 * self.hidden as f64;
        let members = layer.groups.iter().filter(|group| !group.is_empty());
        let groups: Vec<GroupCost> = members.map(|group| self.group(group, effort(group[0].columns))).collect();
        let sweep = |sublayer: &SublayerOutline| 2.0 * sublayer.elements() as f64 * sublayer.columns as f64;
        let sweeps: f64 = layer.sublayers().map(sweep).sum();
        let widest = layer.sublayers().map(|one| one.columns.max(one.rows) as u64).max().unwrap_or(0);
        let input_bytes = |group: &GroupCost| self.bytes_of(group.effort.columns as u64, self.lanes);
        let room = Room {
            weights,
            weights_ahead: 0,
            split: self.split,
            lanes: self.lanes,
            boundary_bytes: self.boundary_bytes(),
            residual_bytes: self.bytes_of(self.hidden, self.lanes),
            input_bytes: groups.iter().map(input_bytes).collect(),
            // The residual stream and its norm, and what the widest sublayers give.
            sequence_bytes: self.sequence.saturating_mul(F32).saturating_mul(2 * self.hidden + 3 * widest),
        };
        LayerCost {
            load_bytes: layer.bytes,
            forward_flops: 2.0 * tokens * weights as f64 + attention,
            streams: self.streams,
            groups,
            // Two energies of half a sweep each; against dense inputs, three and a whole one.
            verify_flops: self.split.sides() as f64 * sweeps * if self.lanes == 2 { 2.5 } else { 1.0 },
            store_bytes: layer.bytes,
            room,
        }
    }
}

/// Bytes of an element, as checkpoints spell its type; quantised ones are stored as f32.
fn bytes_of(dtype: &str) -> u64 {
    match dtype {
        "F16" | "BF16" => 2,
        _ => F32,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use espalier_common::job::CalibrationSpec;

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
            efforts: Vec::new(),
            needs_dense: false,
            imports_zeros: false,
            needs_whole: false,
        }
    }

    pub(in crate::plan) fn job(mode: &str) -> JobSpec {
        serde_json::from_value(serde_json::json!({
            "model": {"source": "m"},
            "calibration": {"source": "c", "samples": 10, "sequence_length": 32, "held_out": 0},
            "propagation": {"mode": mode},
            "output": {"uri": "o"},
        }))
        .unwrap()
    }

    #[test]
    fn a_layer_is_counted_product_by_product() {
        let cost = count(&outline(1), &job("pruned"), Solver::default());
        let layer = &cost.layers[0];
        let (tokens, weights) = (320.0, 64.0 * 64.0 + 2.0 * 256.0 * 64.0);
        assert!((layer.forward_flops - (2.0 * tokens * weights + 2.0 * tokens * 32.0 * 64.0)).abs() < 1.0);
        assert!((layer.gram_flops() - tokens * (2.0 * 64.0 * 64.0 + 256.0 * 256.0)).abs() < 1.0);
        let sweeps = 64.0 * 64.0 * 64.0 + 256.0 * 64.0 * 64.0 + 64.0 * 256.0 * 256.0;
        assert!((layer.verify_flops - 2.0 * sweeps).abs() < 1.0);
        assert_eq!(cost.boundary_bytes, 320 * 64 * 4);
    }

    #[test]
    fn a_chain_reads_the_next_layer_while_one_is_finished() {
        let ahead = |mode| {
            let cost = count(&outline(2), &job(mode), Solver::default());
            cost.layers.iter().map(|layer| layer.room.weights_ahead).collect::<Vec<_>>()
        };
        assert_eq!((ahead("pruned"), ahead("dense")), (vec![64 * 64 + 2 * 256 * 64, 0], vec![0, 0]));
    }

    #[test]
    fn what_is_held_out_is_summed_and_sent_apart() {
        let cost = |held_out: f64| {
            let job = JobSpec {
                calibration: CalibrationSpec { held_out: Some(held_out), ..job("pruned").calibration },
                ..job("pruned")
            };
            let cost = count(&outline(1), &job, Solver::default());
            cost.layers.into_iter().next().unwrap()
        };
        let (none, kept) = (cost(0.0), cost(0.1));
        assert_eq!(kept.groups[2].statistics_bytes, 2 * none.groups[2].statistics_bytes);
        // A measure on both.
        assert!((kept.verify_flops / none.verify_flops - 2.0).abs() < 1e-12);
        // Of ten sequences the last two are leaf 7, which is now of both kinds.
        let sums = |layer: &LayerCost| layer.room.split.most_sums(&(0..LEAVES));
        assert_eq!((sums(&none), sums(&kept)), (4, 5));
    }

    #[test]
    fn a_second_stream_is_at_a_boundary_in_a_chain_alone_and_in_every_layer_that_is_pruned() {
        let cost = |mode, two| {
            let outline = ModelOutline { needs_dense: two, ..outline(1) };
            count(&outline, &job(mode), Solver::default())
        };
        let (one, two, apart) = (cost("pruned", false), cost("pruned", true), cost("dense", true));
        assert_eq!([&one, &two, &apart].map(|cost| cost.boundary_bytes / one.boundary_bytes), [1, 2, 1]);
        assert_eq!([&one, &two, &apart].map(|cost| cost.layers[0].streams), [1, 2, 1]);
        assert_eq!([&one, &two, &apart].map(|cost| cost.layers[0].room.lanes), [1, 2, 2]);
        assert_eq!(two.layers[0].groups, apart.layers[0].groups);
        assert!((apart.layers[0].gram_flops() / one.layers[0].gram_flops() - 4.0).abs() < 1e-12);
        assert!((apart.layers[0].verify_flops / one.layers[0].verify_flops - 2.5).abs() < 1e-12);
    }
}
