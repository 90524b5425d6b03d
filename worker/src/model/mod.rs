//! Model families: which tensors a decoder has, and how hidden states go through it.
//!
//! A family turns `config.json` into a [`Decoder`]; a decoder loads one [`DecoderLayer`] at a time. A layer runs **group by
//! group**: sublayers of a group share their input, and the group after it sees what the (pruned) group before it gives.

mod anatomy;
mod attention;
mod blocks;
mod config;
mod decoder;
mod error;
pub(crate) mod fused;
#[cfg(test)]
mod golden_tests;
mod llama;
mod load;
mod mistral;
mod nemotron_nas;
mod opt;
mod qwen2;
mod qwen3;
#[cfg(test)]
mod refusal_tests;
mod rope;
mod structure;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::Checkpoint;
use espalier_common::ids::LayerIndex;
use espalier_common::outline::LayerOutline;
use espalier_common::structure::{AttentionUnit, Structure};

pub use anatomy::{Activation, Anatomy, HeadNorm, Rotation};
pub use error::ModelError;

/// One sequence on its way through one layer: everything that the groups ahead still need.
#[derive(Debug, Clone)]
pub struct Carry {
    /// The residual stream, `[tokens, hidden]`.
    pub residual: Tensor,
    /// The input of the group that is next, `[tokens, in]`; after the last group, the layer's output `[tokens, hidden]`.
    pub input: Tensor,
}

/// One decoder layer with its weights, f32 on one device.
pub trait DecoderLayer: Send + Sync {
    /// Number of groups.
    fn groups(&self) -> usize;
    /// Starts a sequence: `hidden` `[tokens, hidden]` is the layer's input.
    ///
    /// # Errors
    /// What the tensor backend says.
    fn begin(&self, hidden: &Tensor) -> Result<Carry, ModelError>;
    /// Runs group `group` on `carry.input` and everything between it and the next group's input.
    ///
    /// # Errors
    /// What the tensor backend says.
    fn advance(&self, group: usize, carry: Carry) -> Result<Carry, ModelError>;
    /// The weight `[out, in]` of sublayer `member` of group `group`, in the order of the outline.
    fn weight(&self, group: usize, member: usize) -> &Tensor;
    /// Puts a new weight of the same shape in its place.
    ///
    /// # Errors
    /// What the tensor backend says.
    fn set_weight(&mut self, group: usize, member: usize, weight: Tensor) -> candle_core::Result<()>;
    /// The bias `[out]` of a sublayer, if it has one.
    fn bias(&self, group: usize, member: usize) -> Option<&Tensor>;
    /// Puts a new bias of the same shape in its place; one that the sublayer does not have changes nothing.
    fn set_bias(&mut self, group: usize, member: usize, bias: Tensor);
    /// What happens between the weights, for sequences of `tokens`.
    ///
    /// # Errors
    /// What the tensor backend says.
    fn anatomy(&self, tokens: usize) -> Result<Anatomy, ModelError>;
    /// A copy that shares all tensors until one is replaced.
    fn share(&self) -> Box<dyn DecoderLayer>;

    /// Runs the whole layer on one sequence: `[tokens, hidden]` to `[tokens, hidden]`.
    ///
    /// # Errors
    /// What the tensor backend says.
    fn forward(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let mut carry = self.begin(hidden)?;
        for group in 0..self.groups() {
            carry = self.advance(group, carry)?;
        }
        Ok(carry.input)
    }
}

/// The end of a decoder: final norm and language-model head.
pub trait Head: Send + Sync {
    /// Logits `[tokens, vocabulary]` of hidden states `[tokens, hidden]`, the output of the last layer.
    ///
    /// # Errors
    /// What the tensor backend says.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError>;
}

/// A decoder whose shape is known and whose weights are loaded piece by piece.
pub trait Decoder: Send + Sync {
    /// Name of the family, e.g. `llama`.
    fn family(&self) -> &'static str;
    /// Number of layers.
    fn layers(&self) -> usize;
    /// Width of the residual stream.
    fn hidden_size(&self) -> usize;
    /// Number of token ids.
    fn vocabulary_size(&self) -> usize;
    /// Longest sequence the model can take (learned positions) or was made for.
    fn max_sequence_length(&self) -> Option<usize>;
    /// What a layer is made of, its tensors checked against the checkpoint: present, of the expected shape, a float type.
    ///
    /// # Errors
    /// `MissingTensor`, `Shape`, with the tensor's name.
    fn outline(&self, layer: LayerIndex) -> Result<LayerOutline, ModelError>;
    /// How the layers can be made narrower such that stock loaders still take them, attention by a `unit` at a time.
    fn structure(&self, unit: AttentionUnit) -> Structure;
    /// What its layers are run on.
    fn device(&self) -> &Device;
    /// Hidden states `[tokens, hidden]` of one sequence, the input of layer 0. Reads only the rows it needs.
    ///
    /// # Errors
    /// `TokenOutOfRange`, `SequenceTooLong`, or what the checkpoint says.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError>;
    /// Loads one layer as f32, refusing NaN and infinity by tensor name.
    ///
    /// # Errors
    /// `NotFinite`, or what the checkpoint says.
    fn load_layer(&self, layer: LayerIndex) -> Result<Box<dyn DecoderLayer>, ModelError>;
    /// Loads the final norm and the head.
    ///
    /// # Errors
    /// As `load_layer`.
    fn load_head(&self) -> Result<Box<dyn Head>, ModelError>;
}

/// One row of [`FAMILIES`].
pub struct ModelFamily {
    /// Short name, e.g. `llama`.
    pub name: &'static str,
    /// The `architectures` entries of `config.json` that it reads.
    pub architectures: &'static [&'static str],
    /// Reads the config and checks it against the checkpoint's headers.
    pub open: OpenDecoder,
}

/// Opens a checkpoint of a family on a device.
pub type OpenDecoder = fn(Arc<dyn Checkpoint>, &Device) -> Result<Box<dyn Decoder>, ModelError>;

/// The families that can be read.
pub const FAMILIES: &[ModelFamily] =
    &[llama::FAMILY, mistral::FAMILY, qwen2::FAMILY, qwen3::FAMILY, opt::FAMILY, nemotron_nas::FAMILY];

/// Opens a checkpoint by the first of its config's `architectures`, its weights to be run on `device`.
///
/// # Errors
/// `UnknownArchitecture`; `Config` for a key that is missing or cannot be honoured; `MissingTensor` or `Shape` for tensors
/// outside the layers (those of a layer are checked by [`Decoder::outline`]).
pub fn open(checkpoint: Arc<dyn Checkpoint>, device: &Device) -> Result<Box<dyn Decoder>, ModelError> {
    let architecture = checkpoint.config()["architectures"][0].as_str().unwrap_or("none").to_owned();
    let family = FAMILIES.iter().find(|family| family.architectures.contains(&architecture.as_str()));
    let Some(family) = family else {
        let known: Vec<&str> = FAMILIES.iter().flat_map(|family| family.architectures).copied().collect();
        let path = checkpoint.path().display().to_string();
        return Err(ModelError::UnknownArchitecture { path, architecture, known: known.join(", ") });
    };
    (family.open)(checkpoint, device)
}
