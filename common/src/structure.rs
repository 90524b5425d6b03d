//! What may be cut out of a model's layers, told so that whoever cuts bytes needs to know nothing of models.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What is removed of attention at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionUnit {
    /// A KV head with all its query heads.
    #[default]
    KvHeads,
    /// Query heads, as many of each KV head as of the others; keys and values stay.
    QueryHeads,
    /// Single channels of v with those inputs of o that they reach, as many of each KV head as of the others. No runtime has
    /// values narrower than keys, so that the checkpoint must keep its full shapes.
    Channels,
}

/// How a model can be made narrower, as the worker that knows its family told it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Structure {
    /// Keys of `config.json` that other keys imply in the dense model, and that must be spelled out in a narrower one.
    pub explicit: BTreeMap<String, usize>,
    /// The layers.
    pub layers: Vec<LayerStructure>,
    /// What layers of different widths need to know of the model; `None` where no runtime takes such layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uneven: Option<Uneven>,
    /// Whether no runtime takes it narrower, so that what goes is only zeroed.
    #[serde(default)]
    pub only_masks: bool,
    /// The heads of a layer as it is; `None` where layers differ, or an earlier version did not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<HeadCounts>,
}

/// How many heads attention has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadCounts {
    /// Query heads.
    pub query: usize,
    /// KV heads.
    pub kv: usize,
}

impl HeadCounts {
    /// Whether `devices` can share them: query heads evenly, KV heads evenly or copied evenly.
    ///
    /// Source: vLLM's rule, which copies KV heads where there are fewer of them than devices.
    pub fn split_over(self, devices: usize) -> bool {
        let copied = self.kv > 0 && devices.is_multiple_of(self.kv);
        self.query.is_multiple_of(devices) && (self.kv.is_multiple_of(devices) || copied)
    }
}

impl Structure {
    /// Whether what is removed leaves no shape that a runtime knows.
    pub fn only_masks(&self) -> bool {
        self.only_masks || self.layers.iter().flat_map(LayerStructure::pairs).any(|pair| pair.stride > 1)
    }
}

/// A model whose layers may differ in width, in the format that NVIDIA's search for architectures made for LLaMA's kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uneven {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Channels that a layer keeps must be a multiple of this: loaders compute the width from a factor and round it up.
    pub multiple: usize,
}

/// The coupled pairs of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStructure {
    /// Weights and biases of the layer's linear maps: what shares of parameters are shares of.
    pub parameters: usize,
    /// Attention, in blocks of an [`AttentionUnit`]; `None` where it stays, by method or by family.
    pub attention: Option<Pair>,
    /// The feed-forward part, in blocks of one channel.
    pub channels: Pair,
}

impl LayerStructure {
    /// Both pairs, in dataflow order.
    pub fn pairs(&self) -> impl Iterator<Item = &Pair> {
        self.attention.iter().chain([&self.channels])
    }
}

/// Producers whose rows go with the columns of one consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The consumer's weight.
    pub consumer: String,
    /// Blocks there are.
    pub blocks: usize,
    /// Inputs of the consumer in a block.
    pub block: usize,
    /// How far they are apart. Where that is more than 1, as many blocks as it says interleave, and the pair can only be
    /// masked.
    #[serde(default = "one")]
    pub stride: usize,
    /// The blocks are so many runs of equal length, and each loses as many as the others.
    #[serde(default = "one")]
    pub runs: usize,
    /// Weights and biases that go with a block.
    pub parameters: usize,
    /// Whether the consumer has a bias, which is fitted anew and keeps its shape.
    pub fits_bias: bool,
    /// Every tensor that is cut, the consumer's weight included.
    pub slices: Vec<Slice>,
    /// Keys of `config.json` that count blocks, and what each block counts for.
    pub config: BTreeMap<String, usize>,
    /// What stock loaders ask of the number of blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divides: Option<Divides>,
}

fn one() -> usize {
    1
}

impl Pair {
    /// Whether stock loaders take a model with this many blocks a layer.
    pub fn loads_with(&self, blocks: usize) -> bool {
        let whole = |rule: &Divides| rule.of.is_multiple_of(blocks * rule.per_block);
        self.splits_into(blocks) && self.divides.as_ref().is_none_or(whole)
    }

    /// Whether attention of this many blocks can be split over `devices`.
    pub fn splits_over(&self, blocks: usize, devices: usize) -> bool {
        let query = blocks * self.config.values().max().copied().unwrap_or(1);
        // Runs are the query heads of one KV head, which stays.
        let kv = if self.runs > 1 { self.runs } else { blocks };
        HeadCounts { query, kv }.split_over(devices)
    }

    /// The numbers of blocks nearest to `blocks`, below and above, that are `fit`.
    pub fn nearest(&self, blocks: usize, fit: impl Fn(usize) -> bool) -> Vec<usize> {
        let below = (1..blocks.min(self.blocks + 1)).rev().find(|&fewer| fit(fewer));
        let above = (blocks + 1..=self.blocks).find(|&more| fit(more));
        below.into_iter().chain(above).collect()
    }

    /// Whether every run can keep its part of this many blocks, and at least one.
    pub fn splits_into(&self, blocks: usize) -> bool {
        blocks > 0 && blocks <= self.blocks && blocks.is_multiple_of(self.runs)
    }

    /// The consumer's inputs that belong to a block, ascending.
    pub fn inputs(&self, block: usize) -> impl Iterator<Item = usize> + use<> {
        let (width, stride) = (self.block, self.stride);
        (0..width).map(move |at| (block / stride * width + at) * stride + block % stride)
    }

    /// The block that an input of the consumer belongs to.
    pub fn block_of(&self, input: usize) -> usize {
        input / self.stride / self.block * self.stride + input % self.stride
    }
}

/// One tensor that is cut along one axis.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// Full name.
    pub tensor: String,
    /// 0: rows (or elements of a bias); 1: columns.
    pub axis: usize,
    /// Rows or columns in a block.
    pub width: usize,
}

/// A number of blocks must divide a width.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Divides {
    /// The key that must divide.
    pub key: String,
    /// What a block counts for in it.
    pub per_block: usize,
    /// The key that is divided.
    pub of_key: String,
    /// Its value.
    pub of: usize,
}

/// What stays of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Kept {
    /// Blocks of attention that stay, ascending; `None` if it was left as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<Vec<u32>>,
    /// Feed-forward channels that stay, ascending.
    pub channels: Vec<u32>,
}

impl Kept {
    /// Number of parameters that went.
    pub fn removed(&self, layer: &LayerStructure) -> usize {
        let gone = |pair: &Pair, kept: &[u32]| pair.blocks.saturating_sub(kept.len()) * pair.parameters;
        let attention = layer.attention.as_ref().zip(self.attention.as_ref());
        attention.map_or(0, |(pair, kept)| gone(pair, kept)) + gone(&layer.channels, &self.channels)
    }

    /// Whether the record is one of this layer: indices ascending and in range, and as many in each run.
    pub fn fits(&self, layer: &LayerStructure) -> bool {
        let fits = |pair: &Pair, kept: &[u32]| {
            let run = (pair.blocks / pair.runs.max(1)).max(1);
            let of_run = |index: usize| kept.iter().filter(|&&block| block as usize / run == index).count();
            kept.is_sorted_by(|a, b| a < b)
                && kept.last().is_some_and(|&last| (last as usize) < pair.blocks)
                && (1..pair.runs).all(|index| of_run(index) == of_run(0))
        };
        let attention = match (&layer.attention, &self.attention) {
            (Some(pair), Some(kept)) => fits(pair, kept),
            (None, Some(_)) => false,
            (_, None) => true,
        };
        attention && fits(&layer.channels, &self.channels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(blocks: usize, parameters: usize) -> Pair {
        Pair {
            consumer: "o".into(),
            blocks,
            block: 2,
            stride: 1,
            runs: 1,
            parameters,
            fits_bias: false,
            slices: Vec::new(),
            config: BTreeMap::new(),
            divides: Some(Divides { key: "heads".into(), per_block: 3, of_key: "hidden".into(), of: 576 }),
        }
    }

    #[test]
    fn removed_parameters_are_counted_by_block() {
        let layer = LayerStructure { parameters: 500, attention: Some(pair(4, 50)), channels: pair(30, 10) };
        let kept = Kept { attention: Some(vec![0, 3]), channels: (0..25).collect() };
        assert_eq!(kept.removed(&layer), 2 * 50 + 5 * 10);
        assert!(kept.fits(&layer));
        assert!(!Kept { attention: Some(vec![3, 0]), ..kept.clone() }.fits(&layer));
        assert!(!Kept { channels: vec![30], ..kept.clone() }.fits(&layer));
        let runs = LayerStructure { attention: Some(Pair { runs: 2, ..pair(4, 50) }), ..layer };
        assert!(kept.fits(&runs) && !Kept { attention: Some(vec![0, 1]), ..kept }.fits(&runs));
    }

    #[test]
    fn inputs_of_blocks_cover_the_consumer_once() {
        // 2 KV heads of width 4 with 3 query heads each: channel c of KV head g reaches input c of its three heads.
        let channels = Pair { block: 3, stride: 4, runs: 2, ..pair(8, 1) };
        assert_eq!(channels.inputs(6).collect::<Vec<_>>(), [14, 18, 22]);
        for pair in [channels, Pair { block: 3, ..pair(8, 1) }] {
            let inputs: Vec<(usize, usize)> =
                (0..8).flat_map(|block| pair.inputs(block).map(move |at| (at, block))).collect();
            assert!(inputs.iter().all(|&(at, block)| pair.block_of(at) == block));
            let mut all: Vec<usize> = inputs.into_iter().map(|(at, _)| at).collect();
            all.sort_unstable();
            assert_eq!(all, (0..24).collect::<Vec<_>>());
        }
    }

    #[test]
    fn heads_must_divide_the_hidden_width() {
        let loads: Vec<usize> = (0..5).filter(|&blocks| pair(4, 1).loads_with(blocks)).collect();
        assert_eq!(loads, [1, 2, 3, 4]);
        assert!(!pair(7, 1).loads_with(5));
    }
}
