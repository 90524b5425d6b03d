//! What may be cut out of a model's layers, told so that whoever cuts bytes needs to know nothing of models.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How a model can be made narrower, as the worker that knows its family told it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Structure {
    /// Keys of `config.json` that other keys imply in the dense model, and that must be spelled out in a narrower one.
    pub explicit: BTreeMap<String, usize>,
    /// The layers.
    pub layers: Vec<LayerStructure>,
}

/// The coupled pairs of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStructure {
    /// Weights and biases of the layer's linear maps: what shares of parameters are shares of.
    pub parameters: usize,
    /// Attention, in blocks of one KV head with its query heads; `None` where heads stay, by method or by family.
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

impl Pair {
    /// Whether stock loaders take a model with this many blocks a layer.
    pub fn loads_with(&self, blocks: usize) -> bool {
        let whole = |rule: &Divides| rule.of.is_multiple_of(blocks * rule.per_block);
        blocks > 0 && blocks <= self.blocks && self.divides.as_ref().is_none_or(whole)
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
    /// KV heads that stay, ascending; `None` if attention was left as it is.
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

    /// Whether the record is one of this layer: indices ascending and in range.
    pub fn fits(&self, layer: &LayerStructure) -> bool {
        let fits = |pair: &Pair, kept: &[u32]| {
            kept.is_sorted_by(|a, b| a < b) && kept.last().is_some_and(|&last| (last as usize) < pair.blocks)
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
        assert!(!Kept { channels: vec![30], ..kept }.fits(&layer));
    }

    #[test]
    fn heads_must_divide_the_hidden_width() {
        let loads: Vec<usize> = (0..5).filter(|&blocks| pair(4, 1).loads_with(blocks)).collect();
        assert_eq!(loads, [1, 2, 3, 4]);
        assert!(!pair(7, 1).loads_with(5));
    }
}
