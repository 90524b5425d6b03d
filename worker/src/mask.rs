//! Another checkpoint whose zeros, and whose weights to start from, a method takes instead of a pattern.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::{self, Checkpoint, CheckpointError, cast, sampled_digest};
use espalier_common::config;
use espalier_common::fault::FaultClass;
use espalier_common::outline::{LayerOutline, SublayerOutline};

/// Digits of the mask's digest that become part of the method's version: a run is not resumed with another mask.
const VERSION_DIGITS: usize = 16;

/// Why a checkpoint cannot be the mask.
#[derive(Debug, thiserror::Error)]
pub enum MaskError {
    /// The job names none.
    #[error("[method] {method} keeps the zeros of another checkpoint: name it as mask")]
    Unnamed {
        /// The method.
        method: String,
    },
    /// The mask already says what is to be zero.
    #[error("[pattern] {key} is set, but method {method} keeps the zeros that its mask has")]
    PatternGiven {
        /// The job's key.
        key: &'static str,
        /// The method.
        method: String,
    },
    /// See the checkpoint.
    #[error("[method] mask")]
    Checkpoint(#[from] CheckpointError),
    /// Not the model that is pruned.
    #[error("[method] mask: {tensor} of {path} is {found:?}, but in the model it is {expected:?}")]
    Shape {
        /// The mask's folder or file.
        path: String,
        /// The sublayer.
        tensor: String,
        /// Its shape in the mask.
        found: Vec<usize>,
        /// Its shape in the model.
        expected: [usize; 2],
    },
    /// Not pruned.
    #[error("[method] mask: {tensor} of {path} has no zeros")]
    Dense {
        /// The mask's folder or file.
        path: String,
        /// The sublayer.
        tensor: String,
    },
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
}

impl MaskError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Unnamed { .. } | Self::PatternGiven { .. } | Self::Shape { .. } | Self::Dense { .. } => {
                FaultClass::Reject
            }
            Self::Checkpoint(error) => error.class(),
            Self::Backend(_) => FaultClass::RetryElsewhere,
        }
    }
}

/// A checkpoint that somebody pruned: headers read, no weights.
pub struct Mask {
    checkpoint: Arc<dyn Checkpoint>,
}

impl Mask {
    /// Opens the checkpoint that a URI names.
    ///
    /// # Errors
    /// `Checkpoint`.
    pub fn open(uri: &str) -> Result<Self, MaskError> {
        Ok(Self { checkpoint: config::open_model(uri)? })
    }

    /// Checks by its headers that it is a mask of the model with these layers, and that its first layer is pruned at all:
    /// to look at every weight would take as long as pruning itself, so each layer is looked at when its turn comes.
    ///
    /// # Errors
    /// `Checkpoint` for a tensor that is missing, `Shape`, `Dense`.
    pub fn check(&self, layers: &[LayerOutline]) -> Result<(), MaskError> {
        for sublayer in layers.iter().flat_map(LayerOutline::sublayers) {
            self.header(sublayer)?;
        }
        for sublayer in layers.iter().take(1).flat_map(LayerOutline::sublayers) {
            self.values(sublayer)?;
        }
        Ok(())
    }

    /// What tells it from other masks, for the method's version.
    ///
    /// # Errors
    /// `Checkpoint`.
    pub fn version(&self) -> Result<String, MaskError> {
        let mut digits = sampled_digest(&*self.checkpoint)?.to_string();
        digits.truncate(VERSION_DIGITS);
        Ok(digits)
    }

    /// A sublayer's matrix `[out, in]` in the mask, f32.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn weight(&self, sublayer: &SublayerOutline, device: &Device) -> Result<Tensor, MaskError> {
        Ok(Tensor::from_vec(self.values(sublayer)?, (sublayer.rows, sublayer.columns), device)?)
    }

    fn path(&self) -> String {
        self.checkpoint.path().display().to_string()
    }

    fn header(&self, sublayer: &SublayerOutline) -> Result<checkpoint::Dtype, MaskError> {
        let (tensor, expected) = (sublayer.tensor.clone(), [sublayer.rows, sublayer.columns]);
        let missing =
            || CheckpointError::MissingTensor { path: self.checkpoint.path().clone(), tensor: tensor.clone() };
        let header = self.checkpoint.header(&sublayer.tensor).ok_or_else(missing)?;
        if header.shape != expected {
            return Err(MaskError::Shape { path: self.path(), tensor, found: header.shape.clone(), expected });
        }
        Ok(header.dtype)
    }

    fn values(&self, sublayer: &SublayerOutline) -> Result<Vec<f32>, MaskError> {
        let dtype = self.header(sublayer)?;
        let values = cast::f32_from_bytes(dtype, &self.checkpoint.read(&sublayer.tensor)?);
        if values.iter().all(|value| value.to_bits() & 0x7fff_ffff != 0) {
            return Err(MaskError::Dense { path: self.path(), tensor: sublayer.tensor.clone() });
        }
        Ok(values)
    }
}
