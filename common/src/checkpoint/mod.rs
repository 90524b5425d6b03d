//! Checkpoints: Hugging Face directories of safetensors and GGUF files, read lazily by tensor; safetensors written.
//!
//! Whatever the file is, tensors carry Hugging Face names and Hugging Face layouts here.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// What a checkpoint says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHeader {
    /// Element type. Quantised GGUF tensors are presented as `Bf16`: dequantised and rounded to nearest even.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

impl TensorHeader {
    /// Bytes of the tensor as presented.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }
}

/// A checkpoint that can be read. Opening reads headers only; every read fetches one tensor's bytes.
pub trait Checkpoint: Send + Sync {
    /// The directory or file, for messages.
    fn path(&self) -> &PathBuf;
    /// `config.json` as parsed; for GGUF, the config it amounts to.
    fn config(&self) -> &serde_json::Value;
    /// Names of all tensors, in the order in which they are stored (shards in order of name).
    fn names(&self) -> Vec<&str>;
    /// The header of a tensor, if there is one of that name.
    fn header(&self, name: &str) -> Option<&TensorHeader>;
    /// Reads one tensor: little-endian elements of `header(name).dtype`, row-major.
    ///
    /// # Errors
    /// `MissingTensor`, or what the file system says.
    fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError>;
    /// Reads rows `rows` of a matrix: as `read`, but only those bytes (embeddings are large).
    ///
    /// # Errors
    /// As `read`; `RowsOutOfRange`.
    fn read_rows(&self, name: &str, rows: std::ops::Range<usize>) -> Result<Vec<u8>, CheckpointError>;
    /// Files to be copied byte for byte into a checkpoint made from this one (tokenizer, generation config, …): file name
    /// and contents. For GGUF these are made from its metadata.
    ///
    /// # Errors
    /// What the file system says.
    fn companion_files(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError>;
}

/// Why a checkpoint cannot be read or written. Every message names the file, and the tensor or key.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system failed.
    #[error("{}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// No such tensor.
    #[error("{} has no tensor {tensor}", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
}

impl CheckpointError {
    /// What may be done about it.
    pub fn class(&self) -> crate::fault::FaultClass {
        match self {
            Self::Io { .. } => crate::fault::FaultClass::RetryElsewhere,
            Self::MissingTensor { .. } => crate::fault::FaultClass::Reject,
        }
    }
}
