//! What can go wrong with a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use crate::fault::FaultClass;
use crate::store::StoreError;

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
        source: io::Error,
    },
    /// No such file or directory.
    #[error("{} does not exist", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// Neither a directory with safetensors nor a GGUF file.
    #[error("{} is no checkpoint: give a directory with model.safetensors or model.safetensors.index.json, or a .gguf file", path.display())]
    NotACheckpoint {
        /// The path.
        path: PathBuf,
    },
    /// The file ends before something it must have.
    #[error("{} is truncated: it has {size} bytes, but {needed} are needed for {what}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is cut off: a tensor or a part of the header.
        what: String,
        /// Bytes the file must have.
        needed: u64,
        /// Bytes it has.
        size: u64,
    },
    /// A file that is read whole is larger than any sound one.
    #[error("{} is too large: {what} has {size} bytes, and at most {limit} are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What is too large: the file, or a part of it.
        what: String,
        /// Its size in bytes.
        size: u64,
        /// The bound in bytes.
        limit: u64,
    },
    /// Not JSON.
    #[error("{} is not valid JSON", path.display())]
    InvalidJson {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A key is missing, or its value is of no use.
    #[error("key {key} of {} {problem}", path.display())]
    InvalidKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong, to be read after the key: `is missing`.
        problem: &'static str,
    },
    /// What the header says of a tensor makes no sense.
    #[error("tensor {tensor} of {} {problem}", path.display())]
    InvalidTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong, to be read after the name: `is listed twice`.
        problem: &'static str,
    },
    /// Shape and element type need another number of bytes than there are.
    #[error("tensor {tensor} of {} has {found} bytes, but {dtype} {shape:?} needs {needed}", path.display())]
    ByteLength {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its element type as the file spells it.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes that shape and element type need.
        needed: u64,
        /// Bytes that the offsets give it.
        found: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first} and {second} of {} overlap", path.display())]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The one that starts first.
        first: String,
        /// The one that starts inside it.
        second: String,
    },
    /// Bytes that belong to no tensor.
    #[error("bytes {start}..{end} of the data of {} belong to no tensor", path.display())]
    Hole {
        /// The file.
        path: PathBuf,
        /// First byte, from the end of the header.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// The element type is no float that is read here.
    #[error("tensor {tensor} of {} is stored as {dtype}, which is not read as floats", path.display())]
    UnsupportedDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its element type as the file spells it.
        dtype: String,
    },
    /// No such tensor.
    #[error("{} has no tensor {tensor}", path.display())]
    MissingTensor {
        /// The checkpoint, or the shard in which its index places the tensor.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The index names a shard that is not there.
    #[error("{} places tensor {tensor} in {shard}, which does not exist", path.display())]
    MissingShard {
        /// The index.
        path: PathBuf,
        /// The shard.
        shard: String,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// Rows that a matrix does not have, or a tensor without rows.
    #[error("rows {start}..{end} of tensor {tensor} of {} were asked for, but its shape is {shape:?}", path.display())]
    RowsOutOfRange {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// First row asked for.
        start: usize,
        /// One past the last row asked for.
        end: usize,
    },
    /// A GGUF file of a model that is not read.
    #[error("{} holds a model of architecture {architecture}, and GGUF is read for llama only", path.display())]
    UnsupportedArchitecture {
        /// The file.
        path: PathBuf,
        /// As the file says.
        architecture: String,
    },
    /// The output exists and is not an empty directory.
    #[error("output {} exists and is not an empty directory", path.display())]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// A tensor or file was written that was not planned, or not in its turn.
    #[error("{name} was written to {} out of turn: {expected} was due", path.display())]
    OutOfTurn {
        /// The output.
        path: PathBuf,
        /// What was written.
        name: String,
        /// What should have been.
        expected: String,
    },
    /// No name for a file beside the tensors.
    #[error("`{name}` cannot be the name of a file in {}", path.display())]
    BadFileName {
        /// The checkpoint.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// Not of any form that a model is given in.
    #[error("`{source_name}` is no model source: {problem}")]
    BadSource {
        /// As given.
        source_name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The hub, or the cache in offline mode, did not give a file.
    #[error("cannot get {file} of {source_name}: {reason}")]
    Hub {
        /// The model, as `hf://org/name@revision`.
        source_name: String,
        /// The file.
        file: String,
        /// Why; free of secrets.
        reason: String,
        /// Whether another try may succeed.
        transient: bool,
    },
    /// The object store that it is written to.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CheckpointError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Io { .. } | Self::Hub { transient: true, .. } => FaultClass::RetryElsewhere,
            Self::OutOfTurn { .. } => FaultClass::Bug,
            Self::Store(error) => error.class(),
            Self::NotFound { .. }
            | Self::NotACheckpoint { .. }
            | Self::Truncated { .. }
            | Self::TooLarge { .. }
            | Self::InvalidJson { .. }
            | Self::InvalidKey { .. }
            | Self::InvalidTensor { .. }
            | Self::ByteLength { .. }
            | Self::Overlap { .. }
            | Self::Hole { .. }
            | Self::UnsupportedDtype { .. }
            | Self::MissingTensor { .. }
            | Self::MissingShard { .. }
            | Self::RowsOutOfRange { .. }
            | Self::UnsupportedArchitecture { .. }
            | Self::OutputExists { .. }
            | Self::BadFileName { .. }
            | Self::BadSource { .. }
            | Self::Hub { transient: false, .. } => FaultClass::Reject,
        }
    }

    /// Turns what the file system said of `path` into an error: `NotFound` if it is not there, `Io` otherwise.
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path },
            _ => Self::Io { path, source },
        }
    }
}
