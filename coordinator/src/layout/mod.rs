//! What the checkpoint of a structured result looks like: full shapes with zeros, or narrower ones.
//!
//! Workers leave every tensor at its full shape. Here rows and columns are cut out of bytes by the record of what stays and
//! by what the worker told of the model's structure; nothing here knows a family.

pub mod export;
mod slice;
mod uneven;

use std::collections::BTreeMap;

use espalier_common::checkpoint::TensorHeader;
use espalier_common::job::Layout;
use espalier_common::structure::{Kept, LayerStructure, Pair, Structure, Uneven};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use slice::Cut;

/// What a structured run leaves of a model; part of the checkpoint's `espalier.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StructuredRecord {
    /// How the checkpoint is laid out.
    pub layout: Layout,
    /// What could be cut.
    pub structure: Structure,
    /// What stays, one entry a layer.
    pub kept: Vec<Kept>,
}

impl StructuredRecord {
    /// The share of the layers' parameters that went: rounding and whole heads make it another than what was asked.
    pub fn removed_share(&self) -> f64 {
        let parameters: usize = self.structure.layers.iter().map(|layer| layer.parameters).sum();
        let removed: usize =
            self.structure.layers.iter().zip(&self.kept).map(|(layer, kept)| kept.removed(layer)).sum();
        removed as f64 / parameters.max(1) as f64
    }
}

/// Why a layout cannot hold a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Layers differ in width.
    #[error("layers keep from {least} to {most} {what}, which layout = \"uniform\" cannot hold: use \"padded\"")]
    Uneven {
        /// What differs.
        what: &'static str,
        /// Fewest.
        least: usize,
        /// Most.
        most: usize,
    },
    /// Stock loaders would refuse the shape.
    #[error(
        "{key} = {value} does not divide {of_key} = {of}, so transformers would refuse the model: the nearest that it takes is \
         {nearest}; use layout = \"masked\", or prune to that"
    )]
    WouldNotLoad {
        /// Key of the config.
        key: String,
        /// What it would be.
        value: usize,
        /// Key that it must divide.
        of_key: String,
        /// Its value.
        of: usize,
        /// The nearest values that load.
        nearest: String,
    },
    /// Heads or channels that devices cannot share.
    #[error("{what} = {value} cannot be split over {devices} devices: the nearest that can is {nearest}")]
    WouldNotSplit {
        /// Key of the config.
        what: String,
        /// Its value.
        value: usize,
        /// Devices.
        devices: usize,
        /// The nearest values that can be split.
        nearest: String,
    },
    /// The record does not go with the model.
    #[error("the record of what stays does not fit {0}")]
    Record(String),
    /// Channels that loaders would compute otherwise.
    #[error(
        "layer {layer} keeps {channels} channels, but layout = \"nemotron-nas\" loads multiples of {multiple}: prune to \
         {nearest} with [pattern] round_to, or use \"padded\""
    )]
    Multiple {
        /// The layer.
        layer: usize,
        /// What it keeps.
        channels: usize,
        /// What it must be a multiple of.
        multiple: usize,
        /// The nearest that load.
        nearest: String,
    },
    /// A model that is not of LLaMA's kind.
    #[error("layout = \"nemotron-nas\" is for LLaMA's kind without biases, which this model is not: use \"padded\"")]
    NotUneven,
    /// What was removed leaves no shape that a runtime knows.
    #[error("what was removed leaves no shape that runtimes load: use layout = \"masked\"")]
    OnlyMasked,
    /// The config cannot be edited.
    #[error("config.json is not an object")]
    Config,
}

/// A record made ready for cutting: which blocks of which tensor stay.
pub(crate) struct Narrowing<'a> {
    record: &'a StructuredRecord,
    /// Axis, width, kept blocks and blocks afterwards, by tensor.
    cuts: BTreeMap<&'a str, Cut<'a>>,
    /// Keys of the config that change.
    config: BTreeMap<&'a str, usize>,
    /// Channels of each layer, where each has its own.
    uneven: Option<(&'a Uneven, Vec<usize>)>,
}

/// The kept blocks and the pair they belong to.
type PairKept<'a> = (&'a Pair, &'a [u32]);

impl<'a> Narrowing<'a> {
    /// Checks a record and its layout; a masked one cuts nothing.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub(crate) fn new(record: &'a StructuredRecord) -> Result<Self, LayoutError> {
        let StructuredRecord { structure, kept, layout } = record;
        let mut narrowing = Self { record, cuts: BTreeMap::new(), config: BTreeMap::new(), uneven: None };
        if structure.layers.len() != kept.len() {
            return Err(LayoutError::Record(format!("a model of {} layers", structure.layers.len())));
        }
        // A record comes from a file, and what it says is divided by.
        if structure.uneven.as_ref().is_some_and(|uneven| uneven.multiple == 0 || uneven.hidden == 0) {
            return Err(LayoutError::Record("any model: its `uneven` has a zero".to_owned()));
        }
        for (layer, kept) in structure.layers.iter().zip(kept) {
            if !kept.fits(layer) {
                return Err(LayoutError::Record(layer.channels.consumer.clone()));
            }
        }
        if *layout == Layout::Masked {
            return Ok(narrowing);
        }
        let attention = |(layer, kept): (&'a LayerStructure, &'a Kept)| -> Option<PairKept<'a>> {
            Some((layer.attention.as_ref()?, kept.attention.as_ref()?))
        };
        let channels = |(layer, kept): (&'a LayerStructure, &'a Kept)| -> Option<PairKept<'a>> {
            Some((&layer.channels, &kept.channels))
        };
        let layers = || structure.layers.iter().zip(kept);
        if structure.only_masks() {
            return Err(LayoutError::OnlyMasked);
        }
        // Heads are alike in all layers; channels need not be where the config tells them layer by layer.
        let own = *layout == Layout::NemotronNas;
        narrowing.add("heads", layers().filter_map(attention).collect(), kept.len(), false)?;
        narrowing.add("channels", layers().filter_map(channels).collect(), kept.len(), own)?;
        if !narrowing.config.is_empty() {
            narrowing.config.extend(structure.explicit.iter().map(|(key, value)| (key.as_str(), *value)));
        }
        if *layout == Layout::NemotronNas {
            let uneven = structure.uneven.as_ref().ok_or(LayoutError::NotUneven)?;
            let channels: Vec<usize> = kept.iter().map(|kept| kept.channels.len()).collect();
            channels.iter().enumerate().try_for_each(|(layer, &width)| uneven::check(layer, width, uneven))?;
            narrowing.uneven = Some((uneven, channels));
        }
        Ok(narrowing)
    }

    /// Cuts one pair of every layer, all to the width of the widest, or each to its `own`.
    fn add(
        &mut self,
        what: &'static str,
        pairs: Vec<PairKept<'a>>,
        layers: usize,
        own: bool,
    ) -> Result<(), LayoutError> {
        let widths = || pairs.iter().map(|(_, kept)| kept.len());
        let (Some(least), Some(most)) = (widths().min(), widths().max()) else { return Ok(()) };
        if pairs.len() != layers {
            return Err(LayoutError::Record(format!("{what}: some layers have them and some have not")));
        }
        if self.record.layout == Layout::Uniform && least != most {
            return Err(LayoutError::Uneven { what, least, most });
        }
        for (pair, kept) in pairs {
            if let Some(rule) = pair.divides.as_ref().filter(|_| !pair.loads_with(most)) {
                let nearest = pair.nearest(most, |blocks| pair.loads_with(blocks));
                return Err(LayoutError::WouldNotLoad {
                    key: rule.key.clone(),
                    value: most * rule.per_block,
                    of_key: rule.of_key.clone(),
                    of: rule.of,
                    nearest: either(&nearest, rule.per_block),
                });
            }
            let blocks = if own { kept.len() } else { most };
            for slice in &pair.slices {
                let cut = Cut { axis: slice.axis, width: slice.width, kept, blocks, runs: pair.runs };
                self.cuts.insert(&slice.tensor, cut);
            }
            self.config.extend(pair.config.iter().map(|(key, per_block)| (key.as_str(), most * per_block)));
        }
        Ok(())
    }

    /// Checks that what stays can be shared by `devices`.
    ///
    /// # Errors
    /// `WouldNotSplit` with the nearest shape that can.
    pub(crate) fn check_devices(&self, devices: usize) -> Result<(), LayoutError> {
        if self.record.layout == Layout::Masked || devices < 2 {
            return Ok(());
        }
        let refuse = |what: &str, per_block: usize, blocks: usize, nearest: &[usize]| {
            let (what, value) = (what.to_owned(), blocks * per_block);
            Err(LayoutError::WouldNotSplit { what, value, devices, nearest: either(nearest, per_block) })
        };
        let stays = self.record.kept.iter().any(|kept| kept.attention.is_none());
        if let Some(heads) = self.record.structure.heads.filter(|heads| stays && !heads.split_over(devices)) {
            return refuse("num_attention_heads", 1, heads.query, &[]);
        }
        for (layer, kept) in self.record.structure.layers.iter().zip(&self.record.kept) {
            if let Some((pair, kept)) = layer.attention.as_ref().zip(kept.attention.as_ref()) {
                let blocks = self.blocks_of(pair, kept);
                let fits = |blocks: usize| pair.splits_over(blocks, devices) && pair.loads_with(blocks);
                if !fits(blocks) {
                    let (key, per_block) =
                        pair.config.iter().max_by_key(|(_, count)| **count).map_or(("heads", 1), |(k, c)| (k, *c));
                    return refuse(key, per_block, blocks, &pair.nearest(blocks, fits));
                }
            }
            let blocks = self.blocks_of(&layer.channels, &kept.channels);
            if !blocks.is_multiple_of(devices) {
                let nearest = layer.channels.nearest(blocks, |blocks| blocks.is_multiple_of(devices));
                let key = layer.channels.config.keys().next().map_or("channels", String::as_str);
                return refuse(key, 1, blocks, &nearest);
            }
        }
        Ok(())
    }

    /// Blocks of a pair in the layout, its padding included.
    fn blocks_of(&self, pair: &Pair, kept: &[u32]) -> usize {
        self.cuts.get(pair.consumer.as_str()).map_or(kept.len(), |cut| cut.blocks)
    }

    /// The shape that a tensor gets.
    ///
    /// # Errors
    /// `Record` if the tensor is not as the record has it.
    pub(crate) fn header(&self, name: &str, header: &TensorHeader) -> Result<TensorHeader, LayoutError> {
        match self.cuts.get(name) {
            None => Ok(header.clone()),
            Some(cut) if cut.fits(header) => Ok(cut.header(header)),
            Some(_) => Err(LayoutError::Record(name.to_owned())),
        }
    }

    /// Tensors that are cut.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &str> {
        self.cuts.keys().copied()
    }

    /// Whether nothing but zeros is cut out of a tensor of the full shape `header`.
    pub(crate) fn cuts_only_zeros(&self, name: &str, header: &TensorHeader, bytes: &[u8]) -> bool {
        self.cuts.get(name).is_none_or(|cut| cut.cuts_only_zeros(header, bytes))
    }

    /// The elements that a tensor of the full shape `header` keeps.
    pub(crate) fn bytes(&self, name: &str, header: &TensorHeader, bytes: Vec<u8>) -> Vec<u8> {
        match self.cuts.get(name) {
            Some(cut) => cut.bytes(header, &bytes),
            None => bytes,
        }
    }

    /// The config of the narrower model, or `None` if it is that of the dense one.
    ///
    /// # Errors
    /// `Config`.
    pub(crate) fn config(&self, dense: &Value) -> Result<Option<Vec<u8>>, LayoutError> {
        if self.config.is_empty() {
            return Ok(None);
        }
        let mut config = dense.clone();
        let keys = config.as_object_mut().ok_or(LayoutError::Config)?;
        for (key, value) in &self.config {
            keys.insert((*key).to_owned(), Value::from(*value));
        }
        if let Some((uneven, channels)) = &self.uneven {
            uneven::rewrite(&mut config, channels, uneven)?;
        }
        Ok(Some(serde_json::to_vec_pretty(&config).expect("what was parsed from JSON can be written")))
    }
}

/// Some numbers of blocks as values of a key that counts `per_block` for each.
fn either(blocks: &[usize], per_block: usize) -> String {
    let values: Vec<String> = blocks.iter().map(|blocks| (blocks * per_block).to_string()).collect();
    if values.is_empty() { "none".to_owned() } else { values.join(" or ") }
}

#[cfg(test)]
mod tests {
    use espalier_common::checkpoint::Dtype;
    use espalier_common::structure::{Divides, Slice};

    use super::*;

    fn pair(tensor: &str, blocks: usize, width: usize, key: &str) -> Pair {
        Pair {
            consumer: tensor.to_owned(),
            blocks,
            block: width,
            stride: 1,
            runs: 1,
            parameters: width,
            fits_bias: false,
            slices: vec![Slice { tensor: tensor.to_owned(), axis: 1, width }],
            config: [(key.to_owned(), 1)].into(),
            divides: None,
        }
    }

    fn record(layout: Layout, kept: [(&[u32], &[u32]); 2]) -> StructuredRecord {
        let layer = |index: usize| LayerStructure {
            parameters: 100,
            attention: Some(pair(&format!("{index}.o"), 4, 2, "heads")),
            channels: pair(&format!("{index}.down"), 6, 1, "width"),
        };
        StructuredRecord {
            layout,
            structure: Structure {
                explicit: [("head_dim".to_owned(), 2)].into(),
                layers: vec![layer(0), layer(1)],
                uneven: None,
                only_masks: false,
                heads: None,
            },
            kept: kept
                .map(|(heads, channels)| Kept { attention: Some(heads.to_vec()), channels: channels.to_vec() })
                .into(),
        }
    }

    #[test]
    fn a_uniform_layout_has_the_width_that_every_layer_keeps() {
        let record = record(Layout::Uniform, [(&[0, 2], &[1, 3, 4]), (&[1, 3], &[0, 1, 2])]);
        let narrowing = Narrowing::new(&record).unwrap();
        let config = narrowing.config(&serde_json::json!({ "heads": 4, "width": 6, "other": "x" })).unwrap().unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config, serde_json::json!({ "heads": 2, "width": 3, "other": "x", "head_dim": 2 }));
        let header = TensorHeader { dtype: Dtype::F32, shape: vec![5, 8] };
        assert_eq!(narrowing.header("1.o", &header).unwrap().shape, [5, 4]);
        assert_eq!(narrowing.header("embedding", &header).unwrap(), header);
    }

    #[test]
    fn uneven_layers_are_padded_or_refused() {
        let kept: [(&[u32], &[u32]); 2] = [(&[0, 2], &[1, 3, 4]), (&[1], &[0])];
        let error = Narrowing::new(&record(Layout::Uniform, kept)).err().unwrap();
        assert_eq!(error, LayoutError::Uneven { what: "heads", least: 1, most: 2 });
        let record = record(Layout::Padded, kept);
        let narrowing = Narrowing::new(&record).unwrap();
        let header = TensorHeader { dtype: Dtype::F32, shape: vec![1, 6] };
        assert_eq!(narrowing.header("1.down", &header).unwrap().shape, [1, 3]);
        let bytes = narrowing.bytes("1.down", &header, (0..24).collect());
        assert_eq!(bytes, [0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn uneven_layers_are_as_narrow_as_they_are_where_the_config_tells_them_apart() {
        let kept: [(&[u32], &[u32]); 2] = [(&[0, 2], &[1, 3, 4, 5]), (&[1], &[0, 2])];
        let mut record = record(Layout::NemotronNas, kept);
        assert_eq!(Narrowing::new(&record).err(), Some(LayoutError::NotUneven));
        record.structure.uneven = Some(Uneven { hidden: 6, multiple: 2 });
        let narrowing = Narrowing::new(&record).unwrap();
        let header = TensorHeader { dtype: Dtype::F32, shape: vec![5, 6] };
        let width = |name: &str| narrowing.header(name, &header).unwrap().shape[1];
        assert_eq!((width("0.down"), width("1.down")), (4, 2));
        let heads = TensorHeader { dtype: Dtype::F32, shape: vec![5, 8] };
        assert_eq!(narrowing.header("1.o", &heads).unwrap().shape, [5, 4]);
        let config = narrowing.config(&serde_json::json!({ "heads": 4 })).unwrap().unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["block_configs"].as_array().unwrap().len(), 2);
        record.structure.uneven = Some(Uneven { hidden: 6, multiple: 3 });
        assert!(matches!(Narrowing::new(&record), Err(LayoutError::Multiple { layer: 0, channels: 4, .. })));
        record.structure.uneven = Some(Uneven { hidden: 6, multiple: 0 });
        assert!(matches!(Narrowing::new(&record), Err(LayoutError::Record(_))));
    }

    #[test]
    fn interleaved_blocks_are_only_masked() {
        let mut record = record(Layout::Padded, [(&[0, 2], &[1]), (&[1, 3], &[0])]);
        for layer in &mut record.structure.layers {
            let pair = layer.attention.as_mut().unwrap();
            (pair.stride, pair.runs) = (2, 2);
        }
        assert_eq!(Narrowing::new(&record).err(), Some(LayoutError::OnlyMasked));
        record.layout = Layout::Masked;
        assert!(Narrowing::new(&record).is_ok());
    }

    #[test]
    fn a_masked_layout_cuts_nothing() {
        let record = record(Layout::Masked, [(&[0], &[1]), (&[0, 1], &[0, 1])]);
        let narrowing = Narrowing::new(&record).unwrap();
        assert_eq!(narrowing.config(&serde_json::json!({})).unwrap(), None);
    }

    #[test]
    fn a_shape_that_no_loader_takes_is_refused() {
        let mut record = record(Layout::Uniform, [(&[0, 1, 2], &[0]), (&[0, 1, 2], &[0])]);
        for layer in &mut record.structure.layers {
            let rule = Divides { key: "heads".into(), per_block: 1, of_key: "hidden".into(), of: 8 };
            layer.attention.as_mut().unwrap().divides = Some(rule);
        }
        let refused = Narrowing::new(&record).err().unwrap();
        assert!(matches!(refused, LayoutError::WouldNotLoad { value: 3, of: 8, .. }), "{refused}");
        assert!(refused.to_string().contains("takes is 2 or 4"), "{refused}");
    }

    #[test]
    fn a_shape_that_devices_cannot_share_is_refused() {
        let record = record(Layout::Uniform, [(&[0, 2], &[1, 3, 4]), (&[1, 3], &[0, 1, 2])]);
        let narrowing = Narrowing::new(&record).unwrap();
        assert_eq!(narrowing.check_devices(1), Ok(()));
        let refused = narrowing.check_devices(2).unwrap_err().to_string();
        assert!(refused.starts_with("width = 3 cannot") && refused.ends_with("2 or 4"), "{refused}");
        let refused = narrowing.check_devices(3).unwrap_err().to_string();
        assert!(refused.starts_with("heads = 2 cannot") && refused.ends_with("is 3"), "{refused}");
        let masked = StructuredRecord { layout: Layout::Masked, ..record };
        assert_eq!(Narrowing::new(&masked).unwrap().check_devices(3), Ok(()));
    }

    #[test]
    fn the_share_that_went_is_counted() {
        let record = record(Layout::Masked, [(&[0, 2], &[1, 3, 4]), (&[1, 2, 3], &[0, 1, 2, 3, 4, 5])]);
        // Two heads of 2 and three channels of 1; one head: of 200 parameters.
        assert!((record.removed_share() - 9.0 / 200.0).abs() < 1e-12, "{}", record.removed_share());
    }

    #[test]
    fn a_record_that_does_not_fit_is_refused() {
        let record = record(Layout::Uniform, [(&[0], &[6]), (&[0], &[0])]);
        assert!(matches!(Narrowing::new(&record), Err(LayoutError::Record(_))));
    }
}
