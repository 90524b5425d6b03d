//! What can go wrong between a checkpoint and a running layer.

use espalier_common::checkpoint::CheckpointError;
use espalier_common::fault::FaultClass;

/// Why a model cannot be read or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `architectures` names no family we have.
    #[error("{path}: config.json names the architecture {architecture}, but only {known} can be read")]
    UnknownArchitecture {
        /// The checkpoint.
        path: String,
        /// What it says.
        architecture: String,
        /// What could be read.
        known: String,
    },
    /// A key of `config.json` is missing or has a value we cannot take.
    #[error("{path}: config.json: {key}: {reason}")]
    Config {
        /// The checkpoint.
        path: String,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor has another shape than the config says.
    #[error("{path}: {tensor} has shape {found:?}, but config.json asks for {expected:?}")]
    Shape {
        /// The checkpoint.
        path: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error("{path}: {tensor} holds NaN or infinity")]
    NotFinite {
        /// The file.
        path: String,
        /// The tensor.
        tensor: String,
    },
    /// A token id beyond the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocabulary}")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// More tokens than learned positions.
    #[error("a sequence of {tokens} tokens is longer than the model's {limit} positions")]
    SequenceTooLong {
        /// Length of the sequence.
        tokens: usize,
        /// Number of positions.
        limit: usize,
    },
    /// The run was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
}

impl ModelError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Checkpoint(error) => error.class(),
            Self::Cancelled | Self::Backend(_) => FaultClass::RetryElsewhere,
            _ => FaultClass::Reject,
        }
    }
}
