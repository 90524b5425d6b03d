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

/// What a method takes to solve a group of sublayers, as far as that can be told of inputs so wide: what plans reckon with. Typical
/// figures, where a method looks for itself how long it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Effort {
    /// Width of the group's inputs.
    pub columns: usize,
    /// Operations before the first block, by each worker that solves blocks of the group.
    pub common_flops: u64,
    /// Matrices `[columns, columns]` that workers make for each other before the first block.
    pub parts: usize,
    /// Operations that one of them takes.
    pub part_flops: u64,
    /// Operations for each row.
    pub row_flops: u64,
    /// Most rows of a block; 0 if a sublayer is one block.
    pub block_rows: usize,
    /// Share of the matrix-product speed that solving reaches, in percent.
    pub speed_percent: u32,
    /// Bytes held while blocks are solved, beside weights and statistics.
    pub kept_bytes: u64,
    /// Bytes held for each row of a block that is being solved.
    pub row_bytes: u64,
    /// Whether idle workers take part, where layers are shared.
    pub is_shared: bool,
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
    /// What the job's method takes, for each width that a group of the model has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub efforts: Vec<Effort>,
}
