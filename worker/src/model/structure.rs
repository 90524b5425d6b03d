//! Which tensors are cut together when heads or channels go.

use std::collections::BTreeMap;

use espalier_common::structure::{AttentionUnit, Pair, Slice};

use super::load::LinearSpec;

/// A coupled pair as a family describes it.
pub(super) struct Coupled<'a> {
    /// Linear maps whose rows go, with the rows in a block.
    pub(super) producers: Vec<(&'a LinearSpec, usize)>,
    /// The linear map whose columns go.
    pub(super) consumer: &'a LinearSpec,
    /// Blocks there are.
    pub(super) blocks: usize,
    /// How far apart the consumer's inputs of a block are.
    pub(super) stride: usize,
    /// Runs of blocks that each lose as many as the others.
    pub(super) runs: usize,
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
        let Coupled { blocks, stride, runs, .. } = *self;
        Pair { consumer, blocks, block, stride, runs, parameters, fits_bias, slices, config, divides: None }
    }
}

/// How the heads of a layer are grouped.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    /// Query heads of each KV head.
    pub(super) queries: usize,
    /// KV heads.
    pub(super) kv_heads: usize,
    /// Width of a head.
    pub(super) head_dim: usize,
}

impl Heads {
    /// The pair of attention, `groups` being those of the layer: q, k, v → o.
    pub(super) fn pair(&self, groups: &[Vec<LinearSpec>], unit: AttentionUnit) -> Pair {
        let Self { queries, kv_heads, head_dim } = *self;
        let [q, k, v] = [0, 1, 2].map(|member| &groups[0][member]);
        let consumer = &groups[1][0];
        let coupled = match unit {
            AttentionUnit::KvHeads => Coupled {
                producers: vec![(q, queries * head_dim), (k, head_dim), (v, head_dim)],
                consumer,
                blocks: kv_heads,
                stride: 1,
                runs: 1,
                config: &[("num_attention_heads", queries), ("num_key_value_heads", 1)],
            },
            AttentionUnit::QueryHeads => Coupled {
                producers: vec![(q, head_dim)],
                consumer,
                blocks: kv_heads * queries,
                stride: 1,
                runs: kv_heads,
                config: &[("num_attention_heads", 1)],
            },
            AttentionUnit::Channels => Coupled {
                producers: vec![(v, 1)],
                consumer,
                blocks: kv_heads * head_dim,
                stride: head_dim,
                runs: kv_heads,
                config: &[],
            },
        };
        coupled.pair()
    }
}

/// Weights and biases of all linear maps of a layer.
pub(super) fn parameters(groups: &[Vec<LinearSpec>]) -> usize {
    groups.iter().flatten().map(|linear| linear.rows * (linear.columns + usize::from(linear.bias))).sum()
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use candle_core::{Device, Tensor};
    use espalier_common::checkpoint;
    use espalier_common::ids::LayerIndex;
    use espalier_common::structure::Structure;

    use super::*;
    use crate::apply::bias_name;
    use crate::model::{Decoder, DecoderLayer, open};

    fn decoder(fixture: &Path) -> Box<dyn Decoder> {
        open(checkpoint::open(fixture).unwrap(), &Device::Cpu).unwrap()
    }

    fn fixtures() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families");
        let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }

    const UNITS: [AttentionUnit; 3] = [AttentionUnit::KvHeads, AttentionUnit::QueryHeads, AttentionUnit::Channels];

    /// Zeroes block `block` of the tensors that `wanted` picks.
    fn zero(
        decoder: &dyn Decoder,
        layer: &mut dyn DecoderLayer,
        pair: &Pair,
        block: usize,
        wanted: impl Fn(&Slice) -> bool,
    ) {
        let outline = decoder.outline(LayerIndex(0)).unwrap();
        for slice in pair.slices.iter().filter(|slice| wanted(slice)) {
            for (group, members) in outline.groups.iter().enumerate() {
                for (member, sublayer) in members.iter().enumerate() {
                    let rows: Vec<usize> = (block * slice.width..(block + 1) * slice.width).collect();
                    if slice.tensor == sublayer.tensor {
                        let weight = layer.weight(group, member);
                        let gone = if slice.axis == 0 { rows } else { pair.inputs(block).collect() };
                        let keep = mask(weight.dims()[slice.axis], &gone);
                        let keep = if slice.axis == 0 { keep.unsqueeze(1) } else { keep.unsqueeze(0) };
                        let masked = weight.broadcast_mul(&keep.unwrap()).unwrap();
                        layer.set_weight(group, member, masked).unwrap();
                    } else if slice.tensor == bias_name(&sublayer.tensor) {
                        let bias = layer.bias(group, member).unwrap();
                        let masked = (bias * mask(bias.dims()[0], &rows)).unwrap();
                        layer.set_bias(group, member, masked);
                    }
                }
            }
        }
    }

    fn mask(length: usize, zeros: &[usize]) -> Tensor {
        let keep: Vec<f32> = (0..length).map(|i| f32::from(u8::from(!zeros.contains(&i)))).collect();
        Tensor::from_vec(keep, length, &Device::Cpu).unwrap()
    }

    /// Removing a block altogether gives what zeroing the consumer's columns alone gives: producers and consumer are wired to
    /// each other as the structure says. For attention this is the test that query heads go with their own KV head.
    #[test]
    fn a_block_of_every_pair_is_wired_to_its_consumer_alone() {
        for (fixture, unit) in fixtures().iter().flat_map(|fixture| UNITS.map(|unit| (fixture, unit))) {
            let decoder = decoder(fixture);
            let Structure { layers, .. } = decoder.structure(unit);
            let hidden = decoder.embed(&[3, 1, 4, 1, 5, 9, 2, 6]).unwrap();
            let dense: Arc<dyn DecoderLayer> = Arc::from(decoder.load_layer(LayerIndex(0)).unwrap());
            let before = dense.forward(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for pair in layers[0].pairs() {
                for block in [0, pair.blocks / 2, pair.blocks - 1] {
                    let forward = |wanted: &dyn Fn(&Slice) -> bool| {
                        let mut layer = dense.share();
                        zero(&*decoder, &mut *layer, pair, block, wanted);
                        layer.forward(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
                    };
                    let (columns, everything) = (forward(&|slice| slice.axis == 1), forward(&|_| true));
                    assert_ne!(columns, before, "{}", fixture.display());
                    for (x, y) in columns.iter().zip(&everything) {
                        assert!((x - y).abs() <= 1e-6 * (1.0 + y.abs()), "{}, {unit:?}: {x} {y}", fixture.display());
                    }
                    // A query of zeros still attends, to all keys alike.
                    if unit == AttentionUnit::QueryHeads && pair.consumer != layers[0].channels.consumer {
                        continue;
                    }
                    // Producers alone make the same difference: nothing else reads what they give.
                    for (x, y) in forward(&|slice| slice.axis == 0).iter().zip(&everything) {
                        assert!((x - y).abs() <= 1e-6 * (1.0 + y.abs()), "{}, {unit:?}: {x} {y}", fixture.display());
                    }
                }
            }
        }
    }

    #[test]
    fn the_blocks_of_a_layer_hold_no_more_parameters_than_it_has() {
        for (fixture, unit) in fixtures().iter().flat_map(|fixture| UNITS.map(|unit| (fixture, unit))) {
            let structure = decoder(fixture).structure(unit);
            for layer in &structure.layers {
                let blocks: usize = layer.pairs().map(|pair| pair.blocks * pair.parameters).sum();
                // What is left are the biases of the consumers, and attention where heads stay.
                assert!(blocks <= layer.parameters, "{}", fixture.display());
                assert!(layer.pairs().all(|pair| pair.loads_with(pair.blocks)), "{}", fixture.display());
            }
        }
    }
}
