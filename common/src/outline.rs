//! What a model is made of, as a worker reported it: all the coordinator ever knows of a model.

use serde::{Deserialize, Serialize};

use crate::structure::Structure;

/// One weight matrix that can be pruned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SublayerOutline {
    /// The checkpoint's tensor name, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub tensor: String,
    /// Output rows.
    pub rows: usize,
    /// Input columns.
    pub columns: usize,
    /// Element type as stored, in safetensors' spelling.
    pub dtype: String,
}

impl SublayerOutline {
    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.rows * self.columns
    }
}

/// One decoder layer: groups of sublayers in dataflow order; the members of a group share their input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOutline {
    /// For LLaMA: q,k,v → o → gate,up → down.
    pub groups: Vec<Vec<SublayerOutline>>,
    /// Bytes of all the layer's tensors as stored.
    pub bytes: u64,
}

impl LayerOutline {
    /// All sublayers, in dataflow order.
    pub fn sublayers(&self) -> impl Iterator<Item = &SublayerOutline> {
        self.groups.iter().flatten()
    }
}

/// A model, before anything is planned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelOutline {
    /// The family that reads it, e.g. `llama`.
    pub family: String,
    /// Decoder layers from input to output.
    pub layers: Vec<LayerOutline>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of token ids.
    pub vocabulary_size: usize,
    /// Longest sequence the model was made for, if its config says.
    pub max_sequence_length: Option<usize>,
    /// Bytes of the tensors outside the layers.
    pub other_bytes: u64,
    /// Version of the job's method; part of the run's fingerprint.
    pub method_version: String,
    /// The method's parameters with every default filled in.
    pub method_params: serde_json::Value,
    /// Whether the method compares corrected with dense inputs, which then run side by side in `pruned` propagation.
    #[serde(default)]
    pub needs_dense: bool,
    /// Whether the method keeps the zeros of another checkpoint, so that the job asks for none.
    #[serde(default)]
    pub imports_zeros: bool,
    /// Whether the method needs all sequences of a layer in one place, because it cuts heads and channels by them or tunes on
    /// them what it left: such layers are not shared.
    #[serde(default)]
    pub needs_whole: bool,
    /// What the job's method may cut, if it is one that removes heads and channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structure: Option<Structure>,
}
