//! Checkpoints: Hugging Face directories of safetensors and GGUF files, read lazily by tensor; safetensors written.
//!
//! Whatever the file is, tensors carry Hugging Face names and Hugging Face layouts here.

pub mod cast;
mod companion;
mod destination;
mod error;
mod folder;
mod gguf;
mod header;
pub mod hub;
#[cfg(test)]
mod hub_tests;
mod index;
mod json;
mod partial;
mod reader;
#[cfg(test)]
mod reader_tests;
mod sample;
mod writer;
#[cfg(test)]
mod writer_tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use destination::Target;
pub use error::CheckpointError;
pub use gguf::GgufCheckpoint;
pub use reader::SafetensorsCheckpoint;
pub use sample::sampled_digest;
pub use writer::{CheckpointWriter, WrittenFile, check_target};

/// Opens a checkpoint: a directory of safetensors, or a `.gguf` file. Reads headers, no tensor.
///
/// # Errors
/// Whatever is wrong with the files, see [`CheckpointError`].
pub fn open(path: &Path) -> Result<Arc<dyn Checkpoint>, CheckpointError> {
    let metadata = std::fs::metadata(path).map_err(|source| CheckpointError::io(path, source))?;
    if metadata.is_dir() {
        return Ok(Arc::new(SafetensorsCheckpoint::open(path)?));
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return Ok(Arc::new(GgufCheckpoint::open(path)?));
    }
    Err(CheckpointError::NotACheckpoint { path: path.to_owned() })
}

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
    /// The file that holds a tensor, for messages; `path` for a tensor that is not there.
    fn file_of(&self, name: &str) -> &Path;
    /// `config.json` as parsed; for GGUF, the config it amounts to.
    fn config(&self) -> &serde_json::Value;
    /// Names of all float tensors, in the order in which they are stored (shards in order of name).
    fn names(&self) -> Vec<&str>;
    /// Names of the tensors whose elements are no floats (integers, 8-bit floats): they have no header here and cannot be
    /// read, and a checkpoint made from this one lacks them, so whoever makes one must say so.
    fn other_names(&self) -> Vec<&str> {
        Vec::new()
    }
    /// The header of a tensor, if there is one of that name.
    fn header(&self, name: &str) -> Option<&TensorHeader>;
    /// Reads one tensor: little-endian elements of `header(name).dtype`, row-major.
    ///
    /// # Errors
    /// `MissingTensor`, `UnsupportedDtype`, or what the file system says.
    fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError>;
    /// Reads rows `rows` of a matrix: as `read`, but only those bytes (embeddings are large).
    ///
    /// # Errors
    /// As `read`; `RowsOutOfRange`.
    fn read_rows(&self, name: &str, rows: std::ops::Range<usize>) -> Result<Vec<u8>, CheckpointError>;
    /// `config.json` byte for byte; none if it was made from other metadata.
    ///
    /// # Errors
    /// As [`Self::companion_files`].
    fn config_file(&self) -> Result<Option<Vec<u8>>, CheckpointError> {
        Ok(None)
    }
    /// Files to be copied byte for byte into a checkpoint made from this one (tokenizer, generation config, …): file name
    /// and contents. For GGUF these are made from its metadata.
    ///
    /// # Errors
    /// What the file system says.
    fn companion_files(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError>;
}
