//! Memory that a layer takes of a worker: what is allocated at the place where most is, group by group.

use std::ops::Range;

use espalier_common::calibration::{LEAVES, Split};
use serde::Serialize;

use super::cost::{F32, GroupCost, LayerCost};

/// What a worker takes besides: 48 MiB for the program, its threads and buffers, and the model's headers, and the 64 MiB that the
/// allocator keeps of what was freed.
pub const PROCESS_BYTES: u64 = (48 + 64) << 20;
/// One part in so many comes on top: what lies between allocations.
const SLACK: u64 = 8;

/// What a worker needs at most, by what it needs it for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Memory {
    /// The layer's weights in f32, those that are pruned as they will be stored, and of the group under way what the weights are, by
    /// row, and what they become; or beside the layer that is finished the next one's.
    pub weights_bytes: u64,
    /// Statistics of a group's inputs, or the sums that they come from; and what the group before is measured by meanwhile, where
    /// several do.
    pub gram_bytes: u64,
    /// What the method holds while it solves.
    pub solver_bytes: u64,
    /// What is on its way to and from workers that share the layer.
    pub letters_bytes: u64,
    /// Hidden states of one sequence as they pass the layer: what must be in memory however small the budget is.
    pub sequence_bytes: u64,
    /// Hidden states of calibration sequences; what does not fit goes to the scratch folder.
    pub activation_bytes: u64,
}

impl Memory {
    /// What cannot go to disk.
    pub fn resident_bytes(&self) -> u64 {
        [self.weights_bytes, self.gram_bytes, self.solver_bytes, self.letters_bytes, self.sequence_bytes]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// What the process has at its peak, if so many bytes of hidden states may be in memory.
    pub fn peak_bytes(&self, budget_bytes: u64) -> u64 {
        let taken = self.resident_bytes().saturating_add(self.activation_bytes.min(budget_bytes));
        PROCESS_BYTES.saturating_add(taken).saturating_add(taken / SLACK)
    }

    /// Most bytes of hidden states that a process of so many bytes may keep in memory: the other way round.
    pub fn most_hidden(&self, process_bytes: u64) -> u64 {
        let taken = process_bytes.saturating_sub(PROCESS_BYTES) / (SLACK + 1) * SLACK;
        taken.saturating_sub(self.resident_bytes())
    }

    /// The same beside so many bytes of hidden states that wait for other layers.
    pub fn beside(self, waiting_bytes: u64) -> Self {
        Self { activation_bytes: self.activation_bytes.saturating_add(waiting_bytes), ..self }
    }

    /// The same while a group is measured that takes so many bytes.
    fn while_measuring(self, measured_bytes: u64) -> Self {
        Self { gram_bytes: self.gram_bytes.saturating_add(measured_bytes), ..self }
    }

    /// The one of which more cannot go to disk, with the most hidden states of both.
    pub fn larger(self, other: Self) -> Self {
        let more = if other.resident_bytes() > self.resident_bytes() { other } else { self };
        Self { activation_bytes: self.activation_bytes.max(other.activation_bytes), ..more }
    }
}

/// What goes into the memory that a layer takes, besides its groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Room {
    /// Weights of all sublayers.
    pub weights: u64,
    /// Those of the layer that may be read while this one is finished: in a chain, the next.
    pub weights_ahead: u64,
    /// The sequences, and which of them are held out.
    pub split: Split,
    /// Copies of it that are run side by side while it is pruned, and of the hidden states inside it.
    pub lanes: u64,
    /// Bytes of the hidden states before the layer, all sequences and streams.
    pub boundary_bytes: u64,
    /// Bytes of the residual stream inside the layer, all sequences and lanes.
    pub residual_bytes: u64,
    /// Bytes of the inputs of each group.
    pub input_bytes: Vec<u64>,
    /// Bytes of one sequence on its way through the layer.
    pub sequence_bytes: u64,
}

/// A worker's part in a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Which of the leaves of the sequences it has.
    pub leaves: Range<usize>,
    /// How many others share the layer.
    pub others: u64,
    /// Whether the layer is its own.
    pub is_owner: bool,
    /// Of how many leaves it keeps the layer's input to the end: all if it lends, its own if it has them from layer to layer.
    pub kept: u64,
}

impl Part {
    /// Everything.
    pub const ALONE: Self = Self { leaves: 0..LEAVES, others: 0, is_owner: true, kept: LEAVES as u64 };
}

impl LayerCost {
    /// What it takes of a worker that has a part in it.
    pub fn memory(&self, part: &Part) -> Memory {
        let (mut stored_bytes, mut measured_bytes) = (0, 0);
        let mut most = Memory::default();
        for (group, &input_bytes) in self.groups.iter().zip(&self.room.input_bytes) {
            stored_bytes += group.stored_bytes;
            let steps = [
                self.while_gathered(group, input_bytes, part),
                self.while_solved(group, (input_bytes, stored_bytes), part),
            ];
            most = steps.into_iter().fold(most, |most, step| most.larger(step.while_measuring(measured_bytes)));
            measured_bytes = self.measured_bytes(group, part);
        }
        most.larger(self.while_finished(stored_bytes, part).while_measuring(measured_bytes))
    }

    /// What a group is measured by while whoever has a part of that goes on: its statistics, and its weights as they were, by row,
    /// and as they became. Whoever is alone measures at once.
    fn measured_bytes(&self, group: &GroupCost, part: &Part) -> u64 {
        let is_shared = part.others > 0 && group.solving_bytes(part.others) > 0;
        let statistics = group.sums_bytes.saturating_mul(self.room.split.sides() as u64);
        if is_shared { statistics.saturating_add(group.weights().saturating_mul(2 * F32)) } else { 0 }
    }

    /// The last group's weights are in place, and the sequences go through them.
    fn while_finished(&self, stored_bytes: u64, part: &Part) -> Memory {
        let weights = self.room.weights.saturating_mul(self.room.lanes).saturating_add(self.room.weights_ahead);
        let input_bytes = self.room.input_bytes.last().copied().unwrap_or_default();
        Memory {
            weights_bytes: weights.saturating_mul(F32).saturating_add(if part.is_owner { stored_bytes } else { 0 }),
            sequence_bytes: self.room.sequence_bytes,
            activation_bytes: self.hidden(input_bytes, part),
            ..Memory::default()
        }
    }

    /// What it takes of a worker that only runs it: its input, which stays, and its output.
    pub fn memory_of_forward(&self) -> Memory {
        Memory {
            weights_bytes: self.room.weights.saturating_mul(F32),
            sequence_bytes: self.room.sequence_bytes,
            activation_bytes: self.room.boundary_bytes.saturating_mul(2),
            ..Memory::default()
        }
    }

    /// The layer's input as far as it is kept to the end, for whoever is lost; beside it the residual stream and the group's input.
    fn hidden(&self, input_bytes: u64, part: &Part) -> u64 {
        let carried = self.room.residual_bytes.saturating_add(input_bytes).saturating_mul(part.leaves.len() as u64)
            / LEAVES as u64;
        carried.saturating_add(self.room.boundary_bytes.saturating_mul(part.kept) / LEAVES as u64)
    }

    fn while_gathered(&self, group: &GroupCost, input_bytes: u64, part: &Part) -> Memory {
        let own = self.room.split.most_sums(&part.leaves) as u64;
        // Those that come from others, as a letter and as numbers; those that go, the same.
        let travelling = if part.others == 0 { 0 } else { 2 };
        Memory {
            weights_bytes: self.room.weights.saturating_mul(F32 * self.room.lanes),
            gram_bytes: group.sums_bytes.saturating_mul(own),
            letters_bytes: group.sums_bytes.saturating_mul(travelling),
            sequence_bytes: self.room.sequence_bytes,
            activation_bytes: self.hidden(input_bytes, part),
            solver_bytes: 0,
        }
    }

    fn while_solved(&self, group: &GroupCost, (input_bytes, stored_bytes): (u64, u64), part: &Part) -> Memory {
        let weights_bytes = self.room.weights.saturating_mul(F32 * self.room.lanes);
        let group_bytes = group.weights().saturating_mul(F32);
        // A mean of the sums in f32, and both triangles of what is symmetric.
        let gram_bytes = group.sums_bytes.saturating_mul(self.room.split.sides() as u64);
        let widest = group.blocks().max().unwrap_or(0);
        let solver_bytes = group.effort.kept_bytes.saturating_add(widest.saturating_mul(group.effort.row_bytes));
        let is_shared = part.others > 0 && group.solving_bytes(part.others) > 0;
        if !part.is_owner && !is_shared {
            // It waits for what comes of it.
            return Memory { weights_bytes, activation_bytes: self.hidden(input_bytes, part), ..Memory::default() };
        }
        let parts_bytes = (group.effort.parts as u64).saturating_mul(group.triangle_bytes());
        let letters_bytes = match (is_shared, part.is_owner) {
            (false, _) => 0,
            // Parts of others are kept as letters until they are with everybody; its own go while it makes the next.
            (true, true) => group.statistics_bytes.saturating_add(parts_bytes / 2),
            // One after another.
            (true, false) => group.statistics_bytes.max(group.triangle_bytes()).saturating_mul(2),
        };
        Memory {
            // Whoever owns the layer keeps what it becomes.
            weights_bytes: weights_bytes.saturating_add(group_bytes).saturating_add(if part.is_owner {
                stored_bytes.saturating_add(group_bytes)
            } else {
                0
            }),
            gram_bytes,
            solver_bytes,
            letters_bytes,
            sequence_bytes: 0,
            activation_bytes: self.hidden(input_bytes, part),
        }
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::outline::Effort;

    use super::super::cluster::Solver;
    use super::super::cost::tests::{job, outline};
    use super::super::cost::{self, LayerCost};
    use super::*;

    fn layer() -> LayerCost {
        cost::count(&outline(1), &job("pruned"), Solver::default()).layers.remove(0)
    }

    #[test]
    fn the_widest_group_counts_where_it_takes_most() {
        let memory = layer().memory(&Part::ALONE);
        let (weights, down) = (64 * 64 + 2 * 256 * 64, 64 * 256);
        // Sums in f64 weigh more than what SparseGPT keeps: three matrices.
        let solved =
            4 * (weights + 2 * down) + 2 * weights + 2 * 4 * (256 * 257 / 2) + 3 * 4 * 256 * 256 + 64 * 12 * 256;
        let gathered = 4 * weights + 4 * 8 * (256 * 257 / 2) + 32 * 4 * (2 * 64 + 3 * 256);
        assert_eq!(memory.resident_bytes(), solved.max(gathered));
        // The input, the residual stream and the widest input: 320 tokens.
        assert_eq!(memory.activation_bytes, 320 * 4 * (64 + 64 + 256));
    }

    #[test]
    fn the_next_layer_counts_where_solving_takes_less_than_reading_it() {
        let light = Effort { columns: 64, ..Effort::default() };
        let with_light = |weights_ahead| {
            let mut layer = layer();
            layer.groups.iter_mut().for_each(|group| (group.effort, group.sums_bytes) = (light, 0));
            layer.room.weights_ahead = weights_ahead;
            layer.memory(&Part::ALONE).weights_bytes
        };
        let weights = 64 * 64 + 2 * 256 * 64;
        assert_eq!(with_light(weights), 4 * 2 * weights + 2 * weights);
        assert!(with_light(0) < with_light(weights));
    }

    #[test]
    fn the_budget_for_hidden_states_is_what_the_peak_leaves() {
        let memory = Memory { weights_bytes: 5 << 30, activation_bytes: 40 << 30, ..Memory::default() };
        let most = memory.most_hidden(16 << 30);
        assert!((8 << 30..10 << 30).contains(&most), "{most}");
        assert!(memory.peak_bytes(most) <= 16 << 30);
        assert!(memory.peak_bytes(most + (1 << 20)) > 16 << 30);
        assert_eq!(memory.most_hidden(5 << 30), 0);
    }

    #[test]
    fn an_assistant_holds_its_share_of_the_hidden_states_and_no_input() {
        let layer = layer();
        let owner = layer.memory(&Part { leaves: 0..4, others: 1, is_owner: true, kept: 8 });
        let assistant = layer.memory(&Part { leaves: 4..8, others: 1, is_owner: false, kept: 0 });
        assert_eq!(assistant.activation_bytes, 320 * 4 * (64 + 256) / 2);
        assert_eq!(owner.activation_bytes, assistant.activation_bytes + 320 * 4 * 64);
        assert!(assistant.resident_bytes() <= owner.resident_bytes());
        assert!(owner.activation_bytes < layer.memory(&Part::ALONE).activation_bytes);
    }

    #[test]
    fn a_group_that_several_measure_is_kept_beside_the_next() {
        let mut layer = layer();
        layer.groups.iter_mut().for_each(|group| group.effort.block_rows = 16);
        let two = Part { others: 1, ..Part::ALONE };
        for is_shared in [false, true] {
            layer.groups.iter_mut().for_each(|group| group.effort.is_shared = is_shared);
            for group in &layer.groups {
                let kept = group.sums_bytes * layer.room.split.sides() as u64 + 8 * group.weights();
                assert_eq!(layer.measured_bytes(group, &two), if is_shared { kept } else { 0 });
                assert_eq!(layer.measured_bytes(group, &Part::ALONE), 0);
            }
        }
        // What takes most is the last group, and what it takes is more by what the one before it is measured by.
        let before = layer.measured_bytes(&layer.groups[layer.groups.len() - 2], &two);
        let shared = layer.memory(&two).gram_bytes;
        let last = layer.groups.pop().unwrap();
        layer.groups = vec![last];
        layer.room.input_bytes.drain(..layer.room.input_bytes.len() - 1);
        assert_eq!(shared, layer.memory(&two).gram_bytes + before);
    }
}
