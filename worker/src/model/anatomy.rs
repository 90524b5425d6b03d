//! What a layer does between its weight matrices, as plain numbers: what a hand-written backward pass has to know.

use candle_core::{Result, Tensor};

use super::blocks::{Linear, Norm};
use super::rope::Rope;

/// The fixed parts of a layer of four groups: q, k, v → o → (gate,) up → down. Norms ahead of a half are no part of it.
#[derive(Debug, Clone)]
pub struct Anatomy {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Number of keys a token sees, itself included.
    pub window: Option<usize>,
    /// Rotary positions, if the layer has any.
    pub rotation: Option<Rotation>,
    /// RMS norms of each head of q and of k.
    pub head_norms: Option<[HeadNorm; 2]>,
    /// What stands between the third group and the fourth.
    pub activation: Activation,
    /// The bias `[out]` of each member of each group.
    pub biases: Vec<Vec<Option<Vec<f32>>>>,
}

/// Cosines and sines `[tokens, head_dim / 2]`; channel i turns with channel i + head_dim/2.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// x / √(mean(x²) + ε) · w over the channels of a head.
#[derive(Debug, Clone)]
pub struct HeadNorm {
    /// `[head_dim]`.
    pub weight: Vec<f32>,
    /// ε.
    pub epsilon: f32,
}

/// The non-linearity of a feed-forward half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// silu(gate) · up, of two members.
    GatedSilu,
    /// max(x, 0).
    Relu,
    /// x·Φ(x), with the exact Φ.
    Gelu,
}

impl Rotation {
    /// The turns of a sequence of `tokens`.
    pub(super) fn of(rope: &Rope, tokens: usize) -> Result<Self> {
        let (cos, sin) = rope.angles(tokens)?;
        Ok(Self { cos, sin })
    }
}

impl HeadNorm {
    /// The numbers of a norm; the mean and the bias of a layer norm have no place on a head.
    pub(super) fn of(norm: &Norm) -> Result<Self> {
        let (Norm::Rms { weight, epsilon } | Norm::Layer { weight, epsilon, .. }) = norm;
        Ok(Self { weight: weight.to_vec1()?, epsilon: *epsilon as f32 })
    }
}

/// The biases of all groups.
pub(super) fn biases(groups: &[Vec<Linear>]) -> Result<Vec<Vec<Option<Vec<f32>>>>> {
    let bias = |linear: &Linear| linear.bias.as_ref().map(Tensor::to_vec1).transpose();
    groups.iter().map(|group| group.iter().map(bias).collect()).collect()
}
