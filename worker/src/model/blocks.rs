//! The parts that decoders are built of.

use candle_core::{Result, Tensor};

use super::{Carry, ModelError, fused};
use crate::linalg::by_column;

/// `y = x·Wᵀ (+ b)`.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    weight: Tensor,
    /// `[out]`.
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    /// Of a weight `[out, in]` and, if there is one, a bias `[out]`.
    pub(super) fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Self { weight: by_column(weight)?, bias })
    }

    /// `[out, in]`.
    pub(super) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Puts another weight in the place of this one.
    pub(super) fn set_weight(&mut self, weight: Tensor) -> Result<()> {
        self.weight = by_column(weight)?;
        Ok(())
    }

    /// `[tokens, in]` to `[tokens, out]`, in storage of its own.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// A normalisation of each row.
#[derive(Debug, Clone)]
pub(super) enum Norm {
    /// x / √(mean(x²) + ε) · w. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    Rms {
        /// `[width]`.
        weight: Tensor,
        /// ε.
        epsilon: f64,
    },
    /// (x − mean) / √(var + ε) · w + b. Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    Layer {
        /// `[width]`.
        weight: Tensor,
        /// `[width]`.
        bias: Tensor,
        /// ε.
        epsilon: f64,
    },
}

impl Norm {
    /// Normalises the last dimension; the shape stays.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms { weight, epsilon } => fused::rms_norm(x, weight, *epsilon),
            Self::Layer { weight, bias, epsilon } => fused::layer_norm(x, weight, bias, *epsilon),
        }
    }
}

/// Puts a group's output on the residual stream, which `norm` then turns into the next group's input. The output is nobody else's:
/// on the CPU its storage becomes the sum.
pub(super) fn join(residual: &Tensor, output: Tensor, norm: Option<&Norm>) -> std::result::Result<Carry, ModelError> {
    let residual = fused::add_to(output, residual)?;
    let input = match norm {
        Some(norm) => norm.forward(&residual)?,
        None => residual.clone(),
    };
    Ok(Carry { residual, input })
}
