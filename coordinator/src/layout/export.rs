//! From a masked structured checkpoint to a narrower one.

use std::collections::BTreeMap;
use std::path::Path;

use espalier_common::checkpoint::{self, CheckpointError, CheckpointWriter};
use espalier_common::digest::Digest;
use espalier_common::job::Layout;

use super::{LayoutError, Narrowing, StructuredRecord};
use crate::assemble::{Manifest, replace_config};

/// What is asked of [`export`].
#[derive(Debug, Clone, Copy)]
pub struct Export<'a> {
    /// The masked checkpoint.
    pub source: &'a Path,
    /// Where the other one goes.
    pub target: &'a Path,
    /// Its layout.
    pub layout: Layout,
    /// Largest shard.
    pub shard_bytes: u64,
    /// Devices that must be able to share it.
    pub tensor_parallel: usize,
}

/// Why a checkpoint cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// See the checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// See the layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A file beside the tensors cannot be read.
    #[error("{path}: {name}")]
    File {
        /// The checkpoint.
        path: String,
        /// The file.
        name: String,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// There is no record of what was removed.
    #[error("{path} has no espalier.json that tells which heads and channels were removed")]
    NoRecord {
        /// The checkpoint.
        path: String,
    },
    /// A tensor that the record cuts is not there.
    #[error("{path} has no {tensor}, of which espalier.json says what was removed")]
    Missing {
        /// The checkpoint.
        path: String,
        /// The tensor.
        tensor: String,
    },
    /// Its weights are not those of the record.
    #[error("{path}: {tensor} is not zero where espalier.json says that heads or channels were removed")]
    NotZero {
        /// The checkpoint.
        path: String,
        /// The tensor.
        tensor: String,
    },
    /// It is narrow already.
    #[error("{path} has layout {layout:?}: only a masked checkpoint can be exported")]
    NotMasked {
        /// The checkpoint.
        path: String,
        /// Its layout.
        layout: Layout,
    },
}

/// Writes a masked checkpoint in another layout; returns the digest of every file.
///
/// # Errors
/// See [`ExportError`]; shapes are checked before the first byte is written, and nothing is left behind where a weight that
/// should be zero is not.
pub fn export(asked: &Export<'_>) -> Result<BTreeMap<String, Digest>, ExportError> {
    let path = asked.source.display().to_string();
    checkpoint::check_target(asked.target)?;
    let source = checkpoint::open(asked.source)?;
    let manifest = std::fs::read(asked.source.join("espalier.json"))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
    let Some((manifest, record)) = manifest.and_then(|manifest| manifest.structured.clone().map(|r| (manifest, r)))
    else {
        return Err(ExportError::NoRecord { path });
    };
    if !manifest.job.get("output").is_some_and(serde_json::Value::is_object) {
        return Err(ExportError::NoRecord { path });
    }
    if record.layout != Layout::Masked {
        return Err(ExportError::NotMasked { path, layout: record.layout });
    }
    let record = StructuredRecord { layout: asked.layout, ..record };
    let narrowing = Narrowing::new(&record)?;
    narrowing.check_devices(asked.tensor_parallel)?;
    if let Some(tensor) = narrowing.tensors().find(|tensor| source.header(tensor).is_none()) {
        return Err(ExportError::Missing { path, tensor: tensor.to_owned() });
    }
    let mut plan = Vec::new();
    for name in source.names() {
        if let Some(header) = source.header(name) {
            plan.push((name.to_owned(), narrowing.header(name, header)?));
        }
    }
    let config = narrowing.config(source.config())?;
    let mut writer = CheckpointWriter::create(asked.target, asked.shard_bytes, plan)?;
    let order: Vec<String> = writer.order().map(|(name, _)| name.to_owned()).collect();
    for name in order {
        let bytes = source.read(&name)?;
        let Some(header) = source.header(&name) else { continue };
        if !narrowing.cuts_only_zeros(&name, header, &bytes) {
            return Err(ExportError::NotZero { path, tensor: name });
        }
        writer.write(&name, &narrowing.bytes(&name, header, bytes))?;
    }
    let mut companions = source.companion_files()?;
    let read = |name: &str| {
        std::fs::read(asked.source.join(name)).map_err(|error| ExportError::File {
            path: path.clone(),
            name: name.to_owned(),
            source: error,
        })
    };
    replace_config(&mut companions, config.map_or_else(|| read("config.json"), Ok)?);
    let mut job = manifest.job.clone();
    job["output"]["layout"] = serde_json::json!(asked.layout);
    if asked.tensor_parallel > 1 {
        job["output"]["tensor_parallel"] = serde_json::json!(asked.tensor_parallel);
    }
    // The card holds the job as the manifest has it; what a person wrote beside it stays.
    let told = |job: &serde_json::Value| serde_json::to_string_pretty(job).expect("a job is plain data");
    let card = String::from_utf8_lossy(&read("README.md")?).replace(&told(&manifest.job), &told(&job));
    companions.push(("README.md".to_owned(), card.into_bytes()));
    for (name, bytes) in &companions {
        writer.add_file(name, bytes)?;
    }
    let files = writer.close_tensors()?.iter().map(|file| (file.name.clone(), file.sha256)).collect();
    let manifest = Manifest { job, files, structured: Some(record), ..manifest };
    let manifest = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    writer.add_file("espalier.json", &manifest)?;
    let written = writer.finish()?;
    Ok(written.into_iter().map(|file| (file.name, file.sha256)).collect())
}
