//! One safetensors file: its header, checked whole before any tensor is trusted.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::folder::{Folder, OpenFile};
use super::{CheckpointError, Dtype, TensorHeader};

/// Largest header that is read: that of the format's own library.
const HEADER_LIMIT: u64 = 100_000_000;
/// The header's length comes first, as eight bytes.
const LENGTH_BYTES: u64 = 8;

/// A tensor as the header describes it.
#[derive(Debug)]
pub(super) struct StoredTensor {
    /// Its name.
    pub(super) name: String,
    /// Its element type as the file spells it.
    pub(super) dtype: String,
    /// What is presented of it; nothing if its elements are no floats.
    pub(super) header: Option<TensorHeader>,
    /// Its first byte, from the start of the file.
    pub(super) start: u64,
    /// Its length in bytes.
    pub(super) length: u64,
}

/// An open safetensors file.
#[derive(Debug)]
pub(super) struct SafetensorsFile {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Its tensors in the order of their bytes.
    pub(super) tensors: Vec<StoredTensor>,
    file: OpenFile,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header's members in order; a JSON map would hide that a name comes twice.
struct Members(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        members.push((name, map.next_value()?));
                    }
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

impl SafetensorsFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// Whatever is wrong with the file, see [`CheckpointError`].
    pub(super) fn open(folder: &Folder, name: &str) -> Result<Self, CheckpointError> {
        let file = folder.open(name)?;
        let (path, size) = (file.path(), file.size());
        let truncated =
            |needed| CheckpointError::Truncated { path: path.to_owned(), what: "the header".to_owned(), needed, size };
        if size < LENGTH_BYTES {
            return Err(truncated(LENGTH_BYTES));
        }
        let prefix = file.read(0, LENGTH_BYTES as usize)?;
        let length = u64::from_le_bytes(prefix.try_into().expect("as many bytes come as were asked for"));
        if length > HEADER_LIMIT {
            let what = "the header".to_owned();
            return Err(CheckpointError::TooLarge { path: path.to_owned(), what, size: length, limit: HEADER_LIMIT });
        }
        let data_start = LENGTH_BYTES + length;
        if data_start > size {
            return Err(truncated(data_start));
        }
        // Below the limit, so it fits.
        let header = file.read(LENGTH_BYTES, length as usize)?;
        let members: Members = serde_json::from_slice(&header)
            .map_err(|source| CheckpointError::InvalidJson { path: path.to_owned(), source })?;
        let mut tensors = members
            .0
            .into_iter()
            .map(|(name, entry)| stored_tensor(path, name, entry, data_start, size))
            .collect::<Result<Vec<_>, _>>()?;
        tensors.sort_by(|a, b| (a.start, a.length, &a.name).cmp(&(b.start, b.length, &b.name)));
        check_tiling(path, &tensors, data_start, size)?;
        Ok(Self { path: path.to_owned(), tensors, file })
    }

    /// Reads `length` bytes from `start`, both checked against the file when it was opened.
    pub(super) fn read(&self, start: u64, length: usize) -> Result<Vec<u8>, CheckpointError> {
        self.file.read(start, length)
    }
}

fn stored_tensor(
    path: &Path,
    name: String,
    entry: Entry,
    data_start: u64,
    size: u64,
) -> Result<StoredTensor, CheckpointError> {
    let Entry { dtype, shape, data_offsets: (start, end) } = entry;
    let invalid = |tensor: &str, problem| CheckpointError::InvalidTensor {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        problem,
    };
    let length = end.checked_sub(start).ok_or_else(|| invalid(&name, "ends before it starts"))?;
    let absolute =
        |offset: u64| data_start.checked_add(offset).ok_or_else(|| invalid(&name, "has offsets beyond 2^64"));
    let (start, end) = (absolute(start)?, absolute(end)?);
    if end > size {
        let what = format!("tensor {name}");
        return Err(CheckpointError::Truncated { path: path.to_owned(), what, needed: end, size });
    }
    if let Some(bytes) = element_bytes(&dtype) {
        let needed = shape
            .iter()
            .try_fold(bytes, |product, &extent| product.checked_mul(extent as u64))
            .ok_or_else(|| invalid(&name, "has a shape of more than 2^64 bytes"))?;
        if needed != length {
            let path = path.to_owned();
            return Err(CheckpointError::ByteLength { path, tensor: name, dtype, shape, needed, found: length });
        }
    }
    let header = float_dtype(&dtype).map(|dtype| TensorHeader { dtype, shape });
    Ok(StoredTensor { name, dtype, header, start, length })
}

/// Checks that tensors, in the order of their bytes, tile the data: nothing shared, nothing left over.
fn check_tiling(path: &Path, tensors: &[StoredTensor], data_start: u64, size: u64) -> Result<(), CheckpointError> {
    let hole = |from: u64, to: u64| CheckpointError::Hole {
        path: path.to_owned(),
        start: from - data_start,
        end: to - data_start,
    };
    let mut due = data_start;
    let mut previous = "";
    for tensor in tensors {
        if tensor.start < due {
            let (first, second) = (previous.to_owned(), tensor.name.clone());
            return Err(CheckpointError::Overlap { path: path.to_owned(), first, second });
        }
        if tensor.start > due {
            return Err(hole(due, tensor.start));
        }
        // Checked against the file's size above.
        due = tensor.start + tensor.length;
        previous = &tensor.name;
    }
    if due < size {
        return Err(hole(due, size));
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(CheckpointError::InvalidTensor {
            path: path.to_owned(),
            tensor: pair[0].to_owned(),
            problem: "is listed twice",
        }),
    }
}

fn float_dtype(dtype: &str) -> Option<Dtype> {
    match dtype {
        "F32" => Some(Dtype::F32),
        "F16" => Some(Dtype::F16),
        "BF16" => Some(Dtype::Bf16),
        _ => None,
    }
}

/// Bytes of one element; nothing for element types we do not know, or of less than a byte: nothing can be checked of those.
fn element_bytes(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" | "C64" => Some(8),
        _ => None,
    }
}
