//! The front of a GGUF file: key-value pairs and the list of tensors, every count bounded before it is believed.
//!
//! Source: the GGUF specification, versions 2 and 3 (little-endian).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::dequant::Kind;
use crate::checkpoint::CheckpointError;

/// Largest front that is read, in bytes.
const FRONT_LIMIT: u64 = 256 << 20;
/// Most array elements, all arrays together.
const ELEMENT_LIMIT: u64 = 1 << 23;
/// Deepest array within arrays.
const NESTING_LIMIT: u32 = 4;
/// Most dimensions of a tensor.
const RANK_LIMIT: u32 = 4;
/// Where data starts is a multiple of this, unless the file says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Any integer type.
    Integer(i128),
    /// A float, written as shortly as its own type allows: 1e-5 for the f32 next to it.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// A list.
    Array(Vec<Value>),
}

/// A tensor as the file lists it.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor {
    /// Its name in the file.
    pub(super) name: String,
    /// How it is stored.
    pub(super) kind: Kind,
    /// Its shape, row-major (the file has it reversed).
    pub(super) shape: Vec<usize>,
    /// Its first byte, from the start of the file.
    pub(super) start: u64,
    /// Its length in bytes.
    pub(super) length: u64,
}

/// The front of a file.
#[derive(Debug)]
pub(super) struct Front {
    path: PathBuf,
    values: BTreeMap<String, Value>,
    /// All tensors, in the order of their bytes.
    pub(super) tensors: Vec<StoredTensor>,
}

impl Front {
    /// Reads and checks the front of `file`.
    ///
    /// # Errors
    /// Whatever is wrong with it, see [`CheckpointError`].
    pub(super) fn read(path: &Path, file: &File) -> Result<Self, CheckpointError> {
        let size = file.metadata().map_err(|source| CheckpointError::io(path, source))?.len();
        let mut cursor = Cursor { path, reader: BufReader::new(file), at: 0, size, elements: 0 };
        let mut magic = [0; 4];
        cursor.fill(&mut magic, "the header")?;
        if &magic != b"GGUF" {
            return Err(CheckpointError::NotACheckpoint { path: path.to_owned() });
        }
        if !matches!(cursor.u32("the header")?, 2 | 3) {
            return Err(cursor.invalid("GGUF.version", "is neither 2 nor 3"));
        }
        let tensor_count = cursor.u64("the header")?;
        let value_count = cursor.u64("the header")?;
        // The least pair is an empty key, a type and one byte; the least tensor has no dimensions.
        cursor.check_count("GGUF.kv_count", value_count, 13)?;
        cursor.check_count("GGUF.tensor_count", tensor_count, 24)?;
        let mut values = BTreeMap::new();
        for _ in 0..value_count {
            let key = cursor.text("a key")?;
            let kind = cursor.u32(&key)?;
            let value = cursor.value(&key, kind, 0)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(cursor.invalid(&key, "is given twice"));
            }
        }
        let mut listed = Vec::new();
        for _ in 0..tensor_count {
            listed.push(cursor.listed_tensor()?);
        }
        let front_end = cursor.at;
        let mut front = Self { path: path.to_owned(), values, tensors: Vec::new() };
        let alignment = match front.integer("general.alignment")? {
            None => DEFAULT_ALIGNMENT,
            Some(alignment) if alignment > 0 && alignment <= 1 << 20 => alignment,
            Some(_) => return Err(front.invalid("general.alignment", "is 0 or absurdly large")),
        };
        front.tensors = front.place(listed, front_end.next_multiple_of(alignment), alignment, size)?;
        Ok(front)
    }

    /// Turns offsets into places in the file, and checks that they lie in it and do not overlap.
    fn place(
        &self,
        listed: Vec<StoredTensor>,
        data_start: u64,
        alignment: u64,
        size: u64,
    ) -> Result<Vec<StoredTensor>, CheckpointError> {
        let invalid = |tensor: &StoredTensor, problem| CheckpointError::InvalidTensor {
            path: self.path.clone(),
            tensor: tensor.name.clone(),
            problem,
        };
        let mut tensors = listed;
        for tensor in &mut tensors {
            if !tensor.start.is_multiple_of(alignment) {
                return Err(invalid(tensor, "does not start at a multiple of the file's alignment"));
            }
            let start = tensor.start.checked_add(data_start);
            let end = start.and_then(|start| start.checked_add(tensor.length));
            let (Some(start), Some(end)) = (start, end) else {
                return Err(invalid(tensor, "has an offset beyond 2^64"));
            };
            if end > size {
                let what = format!("tensor {}", tensor.name);
                return Err(CheckpointError::Truncated { path: self.path.clone(), what, needed: end, size });
            }
            tensor.start = start;
        }
        tensors.sort_by_key(|tensor| (tensor.start, tensor.length));
        for pair in tensors.windows(2) {
            if pair[0].start + pair[0].length > pair[1].start {
                let (first, second) = (pair[0].name.clone(), pair[1].name.clone());
                return Err(CheckpointError::Overlap { path: self.path.clone(), first, second });
            }
        }
        Ok(tensors)
    }

    /// An error that names this file and a key.
    pub(super) fn invalid(&self, key: &str, problem: &'static str) -> CheckpointError {
        CheckpointError::InvalidKey { path: self.path.clone(), key: key.to_owned(), problem }
    }

    /// A value, if the key is there.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// A non-negative integer, if the key is there.
    ///
    /// # Errors
    /// `InvalidKey` if it is something else.
    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Integer(integer)) if u64::try_from(integer).is_ok() => Ok(u64::try_from(integer).ok()),
            Some(_) => Err(self.invalid(key, "is not a non-negative integer")),
        }
    }

    /// A finite number, if the key is there.
    ///
    /// # Errors
    /// `InvalidKey` if it is something else.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Float(number)) if number.is_finite() => Ok(Some(number)),
            Some(&Value::Integer(number)) => Ok(Some(number as f64)),
            Some(_) => Err(self.invalid(key, "is not a finite number")),
        }
    }

    /// A truth value, if the key is there.
    ///
    /// # Errors
    /// `InvalidKey` if it is something else.
    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Bool(truth)) => Ok(Some(truth)),
            Some(_) => Err(self.invalid(key, "is not a boolean")),
        }
    }

    /// A text, if the key is there.
    ///
    /// # Errors
    /// `InvalidKey` if it is something else.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.invalid(key, "is not a string")),
        }
    }

    /// A list of texts, if the key is there.
    ///
    /// # Errors
    /// `InvalidKey` if it is something else.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, CheckpointError> {
        let invalid = || self.invalid(key, "is not a list of strings");
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => {
                let text = values.iter().map(|value| match value {
                    Value::Text(text) => Ok(text.as_str()),
                    _ => Err(invalid()),
                });
                text.collect::<Result<_, _>>().map(Some)
            }
            Some(_) => Err(invalid()),
        }
    }

    /// A list of numbers, if the key is there.
    ///
    /// # Errors
    /// `InvalidKey` if it is something else.
    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, CheckpointError> {
        let invalid = || self.invalid(key, "is not a list of numbers");
        let number = |value: &Value| match *value {
            Value::Integer(number) => Ok(number as f64),
            Value::Float(number) if !number.is_nan() => Ok(number),
            _ => Err(invalid()),
        };
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => values.iter().map(number).collect::<Result<_, _>>().map(Some),
            Some(_) => Err(invalid()),
        }
    }
}

/// Reads forward through the front; knows how much of the file is left.
struct Cursor<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    at: u64,
    size: u64,
    elements: u64,
}

impl Cursor<'_> {
    fn invalid(&self, key: &str, problem: &'static str) -> CheckpointError {
        CheckpointError::InvalidKey { path: self.path.to_owned(), key: key.to_owned(), problem }
    }

    /// Checks that `bytes` more can be read, before anything is allocated for them.
    fn check_left(&self, bytes: u64, what: &str) -> Result<(), CheckpointError> {
        let needed = self.at.saturating_add(bytes);
        let (path, what) = (self.path.to_owned(), what.to_owned());
        if needed > self.size {
            return Err(CheckpointError::Truncated { path, what, needed, size: self.size });
        }
        if needed > FRONT_LIMIT {
            return Err(CheckpointError::TooLarge { path, what, size: needed, limit: FRONT_LIMIT });
        }
        Ok(())
    }

    fn check_count(&self, key: &str, count: u64, least_bytes: u64) -> Result<(), CheckpointError> {
        self.check_left(count.saturating_mul(least_bytes), key)
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<(), CheckpointError> {
        self.check_left(bytes.len() as u64, what)?;
        self.reader.read_exact(bytes).map_err(|source| CheckpointError::Io { path: self.path.to_owned(), source })?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CheckpointError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, CheckpointError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Result<String, CheckpointError> {
        let length = self.u64(what)?;
        self.check_left(length, what)?;
        // Below the front's limit, so it fits.
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| self.invalid(what, "is not UTF-8"))
    }

    fn value(&mut self, key: &str, kind: u32, depth: u32) -> Result<Value, CheckpointError> {
        let short = |narrow: f32| narrow.to_string().parse().unwrap_or(f64::from(narrow));
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Integer(self.u32(key)?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(short(f32::from_le_bytes(self.array(key)?))),
            7 => Value::Bool(self.array::<1>(key)? != [0]),
            8 => Value::Text(self.text(key)?),
            9 => self.list(key, depth)?,
            10 => Value::Integer(self.u64(key)?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.array(key)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(self.invalid(key, "has a type that GGUF does not know")),
        })
    }

    fn list(&mut self, key: &str, depth: u32) -> Result<Value, CheckpointError> {
        if depth >= NESTING_LIMIT {
            return Err(self.invalid(key, "is nested too deeply"));
        }
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        let least_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            _ => 8,
        };
        self.check_count(key, count, least_bytes)?;
        self.elements = self.elements.saturating_add(count);
        if self.elements > ELEMENT_LIMIT {
            return Err(self.invalid(key, "has too many elements"));
        }
        (0..count).map(|_| self.value(key, kind, depth + 1)).collect::<Result<_, _>>().map(Value::Array)
    }

    /// Reads one tensor's entry; its start is relative to the data for now.
    fn listed_tensor(&mut self) -> Result<StoredTensor, CheckpointError> {
        let name = self.text("the list of tensors")?;
        let invalid =
            |problem| CheckpointError::InvalidTensor { path: self.path.to_owned(), tensor: name.clone(), problem };
        let absurd = invalid("has a shape of more than 2^64 bytes");
        let (scalar, ragged) =
            (invalid("has no or too many dimensions"), invalid("has rows that are no whole number of blocks"));
        let rank = self.u32(&name)?;
        if rank == 0 || rank > RANK_LIMIT {
            return Err(scalar);
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            match usize::try_from(self.u64(&name)?) {
                Ok(extent) => shape.push(extent),
                Err(_) => return Err(absurd),
            }
        }
        let number = self.u32(&name)?;
        let kind = Kind::from_number(number).ok_or_else(|| CheckpointError::UnsupportedDtype {
            path: self.path.to_owned(),
            tensor: name.clone(),
            dtype: format!("GGML type {number}"),
        })?;
        let start = self.u64(&name)?;
        if !shape[0].is_multiple_of(kind.block_elements()) {
            return Err(ragged);
        }
        shape.reverse();
        let elements = shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent as u64));
        // Elements are also counted in f32, once they are widened.
        match elements.filter(|elements| elements.checked_mul(4).is_some()) {
            None => Err(absurd),
            Some(elements) => {
                let length = elements / kind.block_elements() as u64 * kind.block_bytes() as u64;
                Ok(StoredTensor { name, kind, shape, start, length })
            }
        }
    }
}
