//! Checkpoints as plain bytes, read and damaged without any code of Espalier's, so that a test cannot share its mistakes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use half::bf16;
use serde_json::Value;

/// A `model.safetensors`, taken apart.
#[derive(Debug, Clone)]
pub struct Safetensors {
    /// Tensor name to `dtype`, `shape` and `data_offsets`; also `__metadata__`, if there is one.
    pub header: serde_json::Map<String, Value>,
    /// Everything behind the header.
    pub data: Vec<u8>,
}

impl Safetensors {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read or is no safetensors file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        let (length, rest) = bytes.split_first_chunk::<8>().context("shorter than a header length")?;
        let length = usize::try_from(u64::from_le_bytes(*length))?;
        ensure!(length <= rest.len(), "header of {length} bytes in a file of {}", bytes.len());
        let (header, data) = rest.split_at(length);
        Ok(Self { header: serde_json::from_slice(header)?, data: data.to_vec() })
    }

    /// Writes the file as it stands, sound or not.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, path: &Path) -> Result<()> {
        let header = serde_json::to_vec(&self.header)?;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(&self.data);
        fs::write(path, bytes).with_context(|| path.display().to_string())
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.keys().map(String::as_str).filter(|name| *name != "__metadata__")
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn shape(&self, tensor: &str) -> Result<Vec<usize>> {
        Ok(serde_json::from_value(self.entry(tensor)?["shape"].clone())?)
    }

    /// Bytes of a tensor.
    ///
    /// # Errors
    /// If there is no such tensor, or it lies outside the file.
    pub fn bytes(&self, tensor: &str) -> Result<&[u8]> {
        let (start, end) = self.offsets(tensor)?;
        self.data.get(start..end).with_context(|| format!("{tensor} lies outside the file"))
    }

    /// Elements of a bf16 tensor.
    ///
    /// # Errors
    /// As [`Self::bytes`]; if it is not bf16.
    pub fn bf16(&self, tensor: &str) -> Result<Vec<bf16>> {
        let dtype = &self.entry(tensor)?["dtype"];
        ensure!(dtype == "BF16", "{tensor} is {dtype}");
        Ok(self.bytes(tensor)?.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]])).collect())
    }

    /// Where a tensor starts and ends in [`Self::data`].
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn offsets(&self, tensor: &str) -> Result<(usize, usize)> {
        Ok(serde_json::from_value(self.entry(tensor)?["data_offsets"].clone())?)
    }

    fn entry(&self, tensor: &str) -> Result<&Value> {
        self.header.get(tensor).with_context(|| format!("no tensor {tensor}"))
    }
}

/// Whether a tensor is a weight matrix inside a decoder layer, of the kinds that are pruned.
pub fn is_sublayer(tensor: &str) -> bool {
    const KINDS: [&str; 10] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"];
    let mut parts = tensor.rsplit('.');
    parts.next() == Some("weight")
        && parts.next().is_some_and(|kind| KINDS.contains(&kind))
        && tensor.contains(".layers.")
}

/// Copies a folder of plain files, writable.
///
/// # Errors
/// What the file system says.
pub fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for (name, bytes) in files(from)? {
        fs::write(to.join(name), bytes)?;
    }
    Ok(())
}

/// Checks that two folders hold the same files with the same bytes.
///
/// # Errors
/// Names the first file that differs and the byte where it does.
pub fn same_files(left: &Path, right: &Path) -> Result<()> {
    let (ours, theirs) = (files(left)?, files(right)?);
    ensure!(!ours.is_empty(), "{} is empty", left.display());
    ensure!(
        ours.keys().eq(theirs.keys()),
        "{} holds {:?}, but {} holds {:?}",
        left.display(),
        ours.keys().collect::<Vec<_>>(),
        right.display(),
        theirs.keys().collect::<Vec<_>>()
    );
    for (name, bytes) in &ours {
        let other = &theirs[name];
        if bytes != other {
            let at = bytes.iter().zip(other).take_while(|(a, b)| a == b).count();
            anyhow::bail!(
                "{name} differs from byte {at}: {} and {} bytes in {} and {}",
                bytes.len(),
                other.len(),
                left.display(),
                right.display()
            );
        }
    }
    Ok(())
}

/// Name and contents of every file in a folder. A folder inside it is an error: checkpoints are flat.
fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    fs::read_dir(folder)
        .with_context(|| folder.display().to_string())?
        .map(|entry| {
            let entry = entry?;
            let bytes = fs::read(entry.path()).with_context(|| entry.path().display().to_string())?;
            Ok((entry.file_name().to_string_lossy().into_owned(), bytes))
        })
        .collect()
}
