//! Writes a Hugging Face directory of sharded safetensors, one tensor at a time, and shows it only when it is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use super::destination::{Destination, HashedFile, Target};
use super::index::{INDEX_FILE, Index, SINGLE_FILE};
use super::{CheckpointError, Dtype, TensorHeader};
use crate::digest::Digest;

/// A file of a written checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct WrittenFile {
    /// Its name.
    pub name: String,
    /// SHA-256 of its contents.
    pub sha256: Digest,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Checks that a checkpoint can be written to `target`: it does not exist or is an empty directory, and the nearest
/// directory above it that exists can be written to. Leaves nothing behind.
///
/// # Errors
/// `OutputExists`, `BadSource` if the path ends in no name, or what the file system says.
pub fn check_target(target: &Path) -> Result<(), CheckpointError> {
    let failed = |source| CheckpointError::Io { path: target.to_owned(), source };
    parent_and_name(target)?;
    match fs::read_dir(target).map(|mut entries| entries.next().is_none()) {
        Ok(true) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Ok(false) => return Err(CheckpointError::OutputExists { path: target.to_owned() }),
        Err(error) if error.kind() == ErrorKind::NotADirectory && target.exists() => {
            return Err(CheckpointError::OutputExists { path: target.to_owned() });
        }
        Err(error) => return Err(failed(error)),
    }
    let absolute = std::path::absolute(target).map_err(failed)?;
    let above = absolute.ancestors().skip(1).find(|path| path.exists()).unwrap_or(Path::new("/"));
    tempfile::Builder::new().prefix(".espalier-").tempfile_in(above).map(drop).map_err(failed)
}

/// A checkpoint being written.
///
/// In a folder everything goes to a hidden directory beside the target, which takes the target's name in [`Self::finish`]: a
/// reader sees the whole checkpoint or none. Dropped before that, it leaves nothing behind; what a killed process left goes
/// when the next one writes to the same target. For object stores see [`Target`].
#[derive(Debug)]
pub struct CheckpointWriter {
    target: PathBuf,
    destination: Destination,
    /// All tensors, in the order in which they are due.
    plan: Vec<(String, TensorHeader)>,
    /// Each shard's name and its part of the plan.
    shards: Vec<(String, Range<usize>)>,
    /// Number of tensors written.
    done: usize,
    shard: Option<HashedFile>,
    written: Vec<WrittenFile>,
    closed: bool,
}

impl CheckpointWriter {
    /// [`Self::begin`] in a folder.
    ///
    /// # Errors
    /// Those of [`Self::begin`].
    pub fn create(target: &Path, shard_bytes: u64, plan: Vec<(String, TensorHeader)>) -> Result<Self, CheckpointError> {
        Self::begin(&Target::Folder(target.to_owned()), Digest::of(b""), shard_bytes, plan)
    }

    /// Plans the shards and starts: tensors fill a shard, in the order of `plan`, until the next would take it beyond
    /// `shard_bytes`; a larger tensor has a shard of its own. One shard is `model.safetensors`, without an index. Whoever
    /// begins with the same `owner` writes the same bytes.
    ///
    /// # Errors
    /// Those of [`Target::check`]; `InvalidTensor` if a name comes twice or a shape is absurd.
    pub fn begin(
        target: &Target,
        owner: Digest,
        shard_bytes: u64,
        mut plan: Vec<(String, TensorHeader)>,
    ) -> Result<Self, CheckpointError> {
        check_plan(&target.path(), &plan)?;
        let parts = split(&plan, shard_bytes);
        for part in &parts {
            align(&mut plan[part.clone()]);
        }
        let count = parts.len();
        let name = |number: usize| match count {
            1 => SINGLE_FILE.to_owned(),
            _ => format!("model-{number:05}-of-{count:05}.safetensors"),
        };
        let shards = parts.into_iter().enumerate().map(|(index, part)| (name(index + 1), part)).collect();
        let destination = Destination::begin(target, owner)?;
        let target = target.path();
        Ok(Self { target, destination, plan, shards, done: 0, shard: None, written: Vec::new(), closed: false })
    }

    /// The tensors in the order in which they must be written. That is the planned order, unless a shard mixes element
    /// sizes and an odd number of 2-byte elements would leave a 4-byte one misaligned, which PyTorch cannot load: there the
    /// 4-byte tensors come first.
    pub fn order(&self) -> impl Iterator<Item = (&str, &TensorHeader)> {
        self.plan.iter().map(|(name, header)| (name.as_str(), header))
    }

    /// Writes the next tensor: little-endian elements, row-major.
    ///
    /// # Errors
    /// `OutOfTurn` if it is not the one that is due, `ByteLength`, `Io`.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let Some((due, header)) = self.plan.get(self.done) else {
            return Err(self.out_of_turn(name, "no more tensors"));
        };
        if due != name {
            return Err(self.out_of_turn(name, due));
        }
        if header.bytes() != bytes.len() {
            return Err(CheckpointError::ByteLength {
                path: self.target.clone(),
                tensor: name.to_owned(),
                dtype: dtype_name(header.dtype).to_owned(),
                shape: header.shape.clone(),
                needed: header.bytes() as u64,
                found: bytes.len() as u64,
            });
        }
        let (shard, part) =
            self.shards.iter().find(|(_, part)| part.contains(&self.done)).expect("shards tile the plan");
        let end = part.end;
        let mut file = match self.shard.take() {
            Some(file) => file,
            None => {
                let header = header_bytes(&self.plan[part.clone()]);
                let bytes: usize = self.plan[part.clone()].iter().map(|(_, tensor)| tensor.bytes()).sum();
                let mut file = self.destination.create(shard, (header.len() + bytes) as u64)?;
                file.write(&header)?;
                file
            }
        };
        file.write(bytes)?;
        self.done += 1;
        if self.done == end {
            self.written.push(file.finish()?);
        } else {
            self.shard = Some(file);
        }
        Ok(())
    }

    /// Writes a file beside the tensors.
    ///
    /// # Errors
    /// `BadFileName` if the name is not plain or is taken, `Io`.
    pub fn add_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let mut components = Path::new(name).components();
        let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
        let taken = name == INDEX_FILE
            || self.shards.iter().any(|(shard, _)| shard == name)
            || self.written.iter().any(|file| file.name == name);
        if !plain || taken {
            return Err(CheckpointError::BadFileName { path: self.target.clone(), name: name.to_owned() });
        }
        self.write_whole(name, bytes)
    }

    /// Closes the last shard and writes the index; returns all files so far, with their hashes. More files may be added
    /// after it, such as one that lists these hashes.
    ///
    /// # Errors
    /// `OutOfTurn` if tensors are missing, `Io`.
    pub fn close_tensors(&mut self) -> Result<&[WrittenFile], CheckpointError> {
        if !self.closed {
            if let Some((due, _)) = self.plan.get(self.done) {
                return Err(self.out_of_turn("the end", due));
            }
            if self.plan.is_empty() {
                self.write_whole(SINGLE_FILE, &header_bytes(&[]))?;
            }
            if self.shards.len() > 1 {
                let index = serde_json::to_vec_pretty(&self.index())
                    .map_err(|source| CheckpointError::InvalidJson { path: self.target.join(INDEX_FILE), source })?;
                self.write_whole(INDEX_FILE, &index)?;
            }
            self.closed = true;
        }
        Ok(&self.written)
    }

    /// Makes the checkpoint visible under its name; returns its files in the order in which they were written.
    ///
    /// # Errors
    /// Those of [`Self::close_tensors`]; `OutputExists` if something has taken its place meanwhile.
    pub fn finish(mut self) -> Result<Vec<WrittenFile>, CheckpointError> {
        self.close_tensors()?;
        self.destination.reveal()?;
        Ok(self.written)
    }

    fn write_whole(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let mut file = self.destination.create(name, bytes.len() as u64)?;
        file.write(bytes)?;
        self.written.push(file.finish()?);
        Ok(())
    }

    fn index(&self) -> Index {
        let total_size: usize = self.plan.iter().map(|(_, header)| header.bytes()).sum();
        let total_parameters: usize = self.plan.iter().map(|(_, header)| header.shape.iter().product::<usize>()).sum();
        let metadata = [("total_parameters", total_parameters), ("total_size", total_size)]
            .map(|(key, total)| (key.to_owned(), Value::from(total)));
        let place = |(shard, part): &(String, Range<usize>)| {
            let shard = shard.clone();
            self.plan[part.clone()].iter().map(move |(name, _)| (name.clone(), shard.clone())).collect::<Vec<_>>()
        };
        let weight_map: BTreeMap<_, _> = self.shards.iter().flat_map(place).collect();
        Index { metadata: metadata.into_iter().collect(), weight_map }
    }

    fn out_of_turn(&self, name: &str, expected: &str) -> CheckpointError {
        let (name, expected) = (name.to_owned(), expected.to_owned());
        CheckpointError::OutOfTurn { path: self.target.clone(), name, expected }
    }
}

/// The directory that holds `target`, and its own name.
pub(super) fn parent_and_name(target: &Path) -> Result<(PathBuf, String), CheckpointError> {
    let absolute =
        std::path::absolute(target).map_err(|source| CheckpointError::Io { path: target.to_owned(), source })?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok((parent.to_owned(), name.to_string_lossy().into_owned())),
        _ => Err(CheckpointError::BadSource {
            source_name: target.display().to_string(),
            problem: "an output must be a directory with a name",
        }),
    }
}

fn check_plan(target: &Path, plan: &[(String, TensorHeader)]) -> Result<(), CheckpointError> {
    let invalid = |tensor: &str, problem| {
        Err(CheckpointError::InvalidTensor { path: target.to_owned(), tensor: tensor.to_owned(), problem })
    };
    let mut names = BTreeSet::new();
    let mut total = 0usize;
    for (name, header) in plan {
        if name == "__metadata__" || !names.insert(name) {
            return invalid(name, "is planned twice");
        }
        let bytes = header.shape.iter().try_fold(header.dtype.bytes(), |product, &extent| product.checked_mul(extent));
        match bytes.and_then(|bytes| total.checked_add(bytes)) {
            Some(sum) => total = sum,
            None => return invalid(name, "has a shape of more than 2^64 bytes"),
        }
    }
    Ok(())
}

fn split(plan: &[(String, TensorHeader)], shard_bytes: u64) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let (mut start, mut filled) = (0, 0u64);
    for (number, (_, header)) in plan.iter().enumerate() {
        let bytes = header.bytes() as u64;
        if number > start && filled.saturating_add(bytes) > shard_bytes {
            parts.push(start..number);
            (start, filled) = (number, 0);
        }
        filled = filled.saturating_add(bytes);
    }
    if start < plan.len() {
        parts.push(start..plan.len());
    }
    parts
}

fn align(part: &mut [(String, TensorHeader)]) {
    let mut offset = 0;
    let misaligned = part.iter().any(|(_, header)| {
        let start = offset;
        offset += header.bytes();
        start % header.dtype.bytes() != 0
    });
    if misaligned {
        part.sort_by_key(|(_, header)| std::cmp::Reverse(header.dtype.bytes()));
    }
}

/// The length and the header of a file of these tensors, padded with spaces so that the data starts at a multiple of 8.
fn header_bytes(tensors: &[(String, TensorHeader)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for (name, tensor) in tensors {
        let end = start + tensor.bytes();
        let entry = json!({ "dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
        start = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    }
}

pub(super) fn sync_directory(path: &Path) -> Result<(), CheckpointError> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|source| CheckpointError::Io { path: path.to_owned(), source })
}
