//! GGUF files of the llama architecture, presented as the Hugging Face checkpoint they were made from: its names, its row
//! order, a config and tokenizer files.

mod config;
mod dequant;
mod metadata;
mod names;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use self::config::Shape;
use self::dequant::Kind;
use self::metadata::{Front, StoredTensor};
use self::names::{Role, interleaved_row, role};
use super::cast::bytes_from_f32;
use super::reader::row_bytes;
use super::{Checkpoint, CheckpointError, Dtype, TensorHeader};

/// Elements widened at a time: bounds what a read needs beside its result.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// A GGUF file of the llama architecture.
///
/// If any tensor is quantised, all are presented as bf16, dequantised and rounded to nearest even; otherwise each keeps its
/// stored type. The rows of q and k, which llama.cpp interleaves, are in Hugging Face's order.
#[derive(Debug)]
pub struct GgufCheckpoint {
    path: PathBuf,
    file: File,
    front: Front,
    config: serde_json::Value,
    /// Names in the order of the file.
    names: Vec<String>,
    tensors: BTreeMap<String, Presented>,
}

#[derive(Debug)]
struct Presented {
    header: TensorHeader,
    stored: StoredTensor,
    /// Rows of one head, if they are interleaved.
    interleaved: Option<usize>,
}

impl GgufCheckpoint {
    /// Opens a file: reads its metadata, no tensor but the rotary factors.
    ///
    /// # Errors
    /// Whatever is wrong with the file, see [`CheckpointError`].
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(|source| CheckpointError::io(path, source))?;
        let front = Front::read(path, &file)?;
        let shape = Shape::read(&front, path)?;
        let invalid = |tensor: &StoredTensor, problem| CheckpointError::InvalidTensor {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            problem,
        };
        let quantised = front.tensors.iter().any(|tensor| !matches!(tensor.kind, Kind::Plain(_)));
        let (mut names, mut tensors, mut rope_factors) = (Vec::new(), BTreeMap::new(), None);
        for stored in &front.tensors {
            let (name, interleaved) = match role(&stored.name) {
                Some(Role::Weight(name)) => (name, None),
                Some(Role::Query(name)) => (name, Some(shape.heads)),
                Some(Role::Key(name)) => (name, Some(shape.kv_heads)),
                Some(Role::RopeFactors) => {
                    let bytes = read_at(path, &file, stored.start, stored.length)?;
                    rope_factors = Some(stored.kind.widen(&bytes));
                    continue;
                }
                None => return Err(invalid(stored, "has no counterpart in a LLaMA model")),
            };
            if interleaved.is_some_and(|heads| heads.checked_mul(shape.head_dim) != Some(stored.shape[0] as u64)) {
                return Err(invalid(stored, "has another number of rows than heads times head width"));
            }
            let dtype = match stored.kind {
                Kind::Plain(dtype) if !quantised => dtype,
                _ => Dtype::Bf16,
            };
            let presented = Presented {
                header: TensorHeader { dtype, shape: stored.shape.clone() },
                stored: stored.clone(),
                // Checked to be of a sane width with the metadata.
                interleaved: interleaved.map(|_| shape.head_dim as usize),
            };
            if tensors.insert(name.clone(), presented).is_some() {
                return Err(invalid(stored, "is listed twice"));
            }
            names.push(name);
        }
        let embedding = "model.embed_tokens.weight";
        let embedding: &Presented = tensors.get(embedding).ok_or_else(|| CheckpointError::MissingTensor {
            path: path.to_owned(),
            tensor: "token_embd.weight".to_owned(),
        })?;
        let (dtype, vocabulary) = (embedding.header.dtype, embedding.header.shape[0]);
        let config = config::config(&front, &shape, dtype, vocabulary, rope_factors.as_deref())?;
        Ok(Self { path: path.to_owned(), file, front, config, names, tensors })
    }

    fn presented(&self, name: &str) -> Result<&Presented, CheckpointError> {
        let missing = || CheckpointError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() };
        self.tensors.get(name).ok_or_else(missing)
    }

    /// Reads rows of the file's tensor, as they are stored there, into the presented type.
    fn read_stored_rows(&self, tensor: &Presented, rows: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
        let Presented { header, stored, .. } = tensor;
        let columns = row_elements(header);
        let row = columns / stored.kind.block_elements() * stored.kind.block_bytes();
        if stored.kind == Kind::Plain(header.dtype) {
            return read_at(
                &self.path,
                &self.file,
                stored.start + (rows.start * row) as u64,
                (rows.len() * row) as u64,
            );
        }
        let mut bytes = Vec::with_capacity(rows.len() * columns * header.dtype.bytes());
        let step = (CHUNK_ELEMENTS / columns.max(1)).max(1);
        for start in rows.clone().step_by(step) {
            let count = step.min(rows.end - start);
            let at = stored.start + (start * row) as u64;
            let blocks = read_at(&self.path, &self.file, at, (count * row) as u64)?;
            bytes.extend(bytes_from_f32(header.dtype, &stored.kind.widen(&blocks)));
        }
        Ok(bytes)
    }
}

/// Elements of one row. A vector's rows are its elements, for q and k biases are interleaved one by one.
fn row_elements(header: &TensorHeader) -> usize {
    header.shape.iter().skip(1).product()
}

fn read_at(path: &Path, file: &File, start: u64, length: u64) -> Result<Vec<u8>, CheckpointError> {
    let failed = |source| CheckpointError::Io { path: path.to_owned(), source };
    let length = usize::try_from(length).map_err(|_| failed(std::io::ErrorKind::FileTooLarge.into()))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, start).map_err(failed)?;
    Ok(bytes)
}

impl Checkpoint for GgufCheckpoint {
    fn path(&self) -> &PathBuf {
        &self.path
    }

    fn file_of(&self, _: &str) -> &Path {
        &self.path
    }

    fn config(&self) -> &serde_json::Value {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    fn header(&self, name: &str) -> Option<&TensorHeader> {
        self.tensors.get(name).map(|tensor| &tensor.header)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let rows = self.presented(name)?.header.shape[0];
        self.read_rows(name, 0..rows)
    }

    fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
        let tensor = self.presented(name)?;
        row_bytes(&self.path, name, &tensor.header, &rows)?;
        if tensor.header.shape.len() == 1 && !matches!(tensor.stored.kind, Kind::Plain(_)) {
            // Its blocks span what would be rows.
            let (path, tensor) = (self.path.clone(), name.to_owned());
            return Err(CheckpointError::InvalidTensor { path, tensor, problem: "is a quantised vector" });
        }
        let Some(head_rows) = tensor.interleaved else { return self.read_stored_rows(tensor, rows) };
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let heads = rows.start / head_rows * head_rows..rows.end.next_multiple_of(head_rows);
        let stored = self.read_stored_rows(tensor, heads.clone())?;
        let row = row_elements(&tensor.header) * tensor.header.dtype.bytes();
        let mut bytes = Vec::with_capacity(rows.len() * row);
        for wanted in rows {
            let from = (interleaved_row(wanted, head_rows) - heads.start) * row;
            bytes.extend_from_slice(&stored[from..from + row]);
        }
        Ok(bytes)
    }

    fn companion_files(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        tokenizer::companion_files(&self.front)
    }
}
