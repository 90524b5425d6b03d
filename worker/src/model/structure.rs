//! Which tensors are cut together when heads or channels go.

use std::collections::BTreeMap;

use espalier_common::structure::{Pair, Slice};

use super::load::LinearSpec;

/// A coupled pair as a family describes it.
pub(super) struct Coupled<'a> {
    /// Linear maps whose rows go, with the rows in a block.
    pub(super) producers: Vec<(&'a LinearSpec, usize)>,
    /// The linear map whose columns go.
    pub(super) consumer: &'a LinearSpec,
    /// Blocks there are.
    pub(super) blocks: usize,
    /// Keys of the config that count blocks, and what each block counts for.
    pub(super) config: &'a [(&'static str, usize)],
}

impl Coupled<'_> {
    /// The pair, its parameters counted; what loaders ask is for the family to add.
    pub(super) fn pair(&self) -> Pair {
        let block = self.consumer.columns / self.blocks;
        let mut slices = Vec::new();
        let mut parameters = self.consumer.rows * block;
        for (producer, rows) in &self.producers {
            let mut cut = |tensor: String| slices.push(Slice { tensor, axis: 0, width: *rows });
            cut(producer.weight_name());
            parameters += rows * producer.columns;
            if producer.bias {
                cut(producer.bias_name());
                parameters += rows;
            }
        }
        slices.push(Slice { tensor: self.consumer.weight_name(), axis: 1, width: block });
        let config: BTreeMap<String, usize> =
            self.config.iter().map(|(key, count)| ((*key).to_owned(), *count)).collect();
        let consumer = self.consumer.weight_name();
        let fits_bias = self.consumer.bias;
        Pair { consumer, blocks: self.blocks, block, parameters, fits_bias, slices, config, divides: None }
    }
}

/// Weights and biases of all linear maps of a layer.
pub(super) fn parameters(groups: &[Vec<LinearSpec>]) -> usize {
    groups.iter().flatten().map(|linear| linear.rows * (linear.columns + usize::from(linear.bias))).sum()
}
