//! Artifacts + untouched tensors → sparse checkpoint, every digest checked.

use std::collections::BTreeMap;
use std::path::Path;

use espalier_common::checkpoint::{Checkpoint, CheckpointWriter, Dtype, TensorHeader};
use espalier_common::config;
use espalier_common::digest::{Digest, Hasher};
use espalier_common::ids::LayerIndex;
use espalier_common::job::{JobSpec, PatternSpec};
use espalier_common::pattern::Pattern;
use espalier_common::report::Artifact;
use espalier_common::store::{BlobStore, StoreError};
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::error::RunError;
use crate::layout::{Narrowing, StructuredRecord};

/// Read at a time when an artifact is hashed.
const HASH_BYTES: u64 = 8 << 20;
/// A longer manifest is not one of ours.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;
/// A header of an artifact longer than this is not one of ours.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// What a checkpoint is assembled from.
pub struct Parts<'a> {
    /// The job.
    pub job: &'a JobSpec,
    /// The source.
    pub dense: &'a dyn Checkpoint,
    /// Digest of the source's files.
    pub model: Digest,
    /// Digest of the calibration tokens.
    pub tokens: Digest,
    /// The method's version.
    pub method_version: &'a str,
    /// The method's parameters, defaults filled in.
    pub method_params: &'a serde_json::Value,
    /// Whether the zeros are those of another checkpoint.
    pub imports_zeros: bool,
    /// Where the artifacts are.
    pub store: &'a dyn BlobStore,
    /// The pruned layers.
    pub layers: &'a BTreeMap<LayerIndex, Artifact>,
    /// What stays of the layers, if heads and channels were removed.
    pub structured: Option<&'a StructuredRecord>,
    /// Set when somebody wants it to stop.
    pub stop: &'a CancellationToken,
}

/// Where a pruned tensor's bytes are.
struct Place<'a> {
    artifact: &'a Artifact,
    header: TensorHeader,
    start: u64,
}

/// Writes the checkpoint and makes it visible, unless an earlier life of the run did; returns the digest of every file.
///
/// # Errors
/// `Damaged` or `Artifact` if an artifact is not what it should be; what the checkpoint, store or file system says;
/// `Interrupted`. Nothing is visible unless it is whole.
pub fn assemble(parts: &Parts<'_>) -> Result<BTreeMap<String, Digest>, RunError> {
    let target = config::output_target(&parts.job.output.uri)?;
    if let Some(files) = already_there(parts, target.store()?.as_ref()) {
        target.settle()?;
        return Ok(files);
    }
    let mut pruned = BTreeMap::new();
    for artifact in parts.layers.values() {
        check_digest(parts.store, artifact)?;
        for (name, place) in places(parts.store, artifact)? {
            check_against_source(parts.dense, artifact, &name, &place.header)?;
            pruned.insert(name, place);
        }
    }
    let narrowing = parts.structured.map(Narrowing::new).transpose()?;
    let mut plan = Vec::new();
    for name in parts.dense.names() {
        let header = pruned.get(name).map(|place| &place.header).or_else(|| parts.dense.header(name));
        let Some(header) = header else { continue };
        let header = narrowing.as_ref().map_or_else(|| Ok(header.clone()), |n| n.header(name, header))?;
        plan.push((name.to_owned(), header));
    }
    let told = serde_json::to_vec(&told_job(parts)).expect("a job is plain data");
    let mut writer = CheckpointWriter::begin(&target, Digest::of(&told), parts.job.shard_bytes()?, plan)?;
    let order: Vec<String> = writer.order().map(|(name, _)| name.to_owned()).collect();
    for name in order {
        if parts.stop.is_cancelled() {
            return Err(RunError::Interrupted);
        }
        match pruned.get(&name) {
            Some(place) => {
                let end = place.start + place.header.bytes() as u64;
                let bytes = parts.store.get_range(&place.artifact.name, place.start..end)?;
                match &narrowing {
                    Some(narrowing) => writer.write(&name, &narrowing.bytes(&name, &place.header, bytes.to_vec()))?,
                    None => writer.write(&name, &bytes)?,
                }
            }
            None => writer.write(&name, &parts.dense.read(&name)?)?,
        }
    }
    let config = serde_json::to_vec_pretty(parts.dense.config()).expect("what was parsed from JSON can be written");
    let mut companions = parts.dense.companion_files()?;
    // Byte for byte where the source has the file; only a GGUF's config is made from its metadata.
    if !companions.iter().any(|(name, _)| name == "config.json") {
        let original = parts.dense.config_file()?.unwrap_or(config);
        companions.push(("config.json".to_owned(), original));
    }
    if let Some(narrowed) = narrowing.as_ref().map(|n| n.config(parts.dense.config())).transpose()?.flatten() {
        replace_config(&mut companions, narrowed);
    }
    for (name, bytes) in companions.iter().filter(|(name, _)| name != "README.md") {
        writer.add_file(name, bytes)?;
    }
    writer.add_file("README.md", model_card(parts).as_bytes())?;
    let files: BTreeMap<String, Digest> =
        writer.close_tensors()?.iter().map(|file| (file.name.clone(), file.sha256)).collect();
    writer.add_file("espalier.json", &manifest(parts, &files))?;
    let written = writer.finish()?;
    Ok(written.into_iter().map(|file| (file.name, file.sha256)).collect())
}

/// Puts a config in the place of the one that was to be copied.
pub(crate) fn replace_config(companions: &mut Vec<(String, Vec<u8>)>, config: Vec<u8>) {
    companions.retain(|(name, _)| name != "config.json");
    companions.push(("config.json".to_owned(), config));
}

/// The files of the output, if it holds the checkpoint of this very job and every file is what its manifest says: the process
/// died between making it visible and recording it.
fn already_there(parts: &Parts<'_>, output: &dyn BlobStore) -> Option<BTreeMap<String, Digest>> {
    let manifest = output.get_at_most("espalier.json", MAX_MANIFEST_BYTES).ok()?;
    let told: Manifest = serde_json::from_slice(&manifest).ok()?;
    if told.job != told_job(parts) {
        return None;
    }
    let mut files = told.files;
    let whole = files.iter().all(|(name, digest)| digest_of(output, name).is_ok_and(|found| found == *digest));
    files.insert("espalier.json".to_owned(), Digest::of(&manifest));
    whole.then_some(files)
}

/// Digest of a blob, which is never in memory whole.
///
/// # Errors
/// What the store says.
pub(crate) fn digest_of(store: &dyn BlobStore, name: &str) -> Result<Digest, StoreError> {
    let (mut hasher, size) = (Hasher::default(), store.size(name)?);
    for at in (0..size).step_by(HASH_BYTES as usize) {
        hasher.update(&store.get_range(name, at..(at + HASH_BYTES).min(size))?);
    }
    Ok(hasher.finish())
}

fn check_digest(store: &dyn BlobStore, artifact: &Artifact) -> Result<(), RunError> {
    if store.size(&artifact.name)? != artifact.bytes || digest_of(store, &artifact.name)? != artifact.sha256 {
        let (name, expected) = (artifact.name.clone(), artifact.sha256.to_string());
        return Err(RunError::Damaged { name, expected });
    }
    Ok(())
}

fn places<'a>(store: &dyn BlobStore, artifact: &'a Artifact) -> Result<Vec<(String, Place<'a>)>, RunError> {
    let wrong = |reason: String| RunError::Artifact { name: artifact.name.clone(), reason };
    let length = store.get_range(&artifact.name, 0..8)?;
    let length = u64::from_le_bytes(length[..].try_into().map_err(|_| wrong("it is shorter than 8 bytes".to_owned()))?);
    if length > MAX_HEADER_BYTES {
        return Err(wrong(format!("its header has {length} bytes")));
    }
    let header = store.get_range(&artifact.name, 8..8 + length)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| wrong(error.to_string()))?;
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => Dtype::F32,
                safetensors::Dtype::F16 => Dtype::F16,
                safetensors::Dtype::BF16 => Dtype::Bf16,
                other => return Err(wrong(format!("{name} is {other:?}"))),
            };
            let header = TensorHeader { dtype, shape: info.shape.clone() };
            Ok((name, Place { artifact, header, start: 8 + length + info.data_offsets.0 as u64 }))
        })
        .collect()
}

fn check_against_source(
    dense: &dyn Checkpoint,
    artifact: &Artifact,
    name: &str,
    header: &TensorHeader,
) -> Result<(), RunError> {
    match dense.header(name) {
        Some(source) if source == header => Ok(()),
        source => Err(RunError::Artifact {
            name: artifact.name.clone(),
            reason: format!("{name} is {header:?}, but the source has {source:?}"),
        }),
    }
}

/// The job as the checkpoint tells it: without where it ran or lies, so that the same job gives the same bytes anywhere.
fn told_job(parts: &Parts<'_>) -> serde_json::Value {
    let job = parts.job;
    let name = |source: &str| {
        let is_path = !source.contains("://");
        let last = Path::new(source).file_name().map(|name| name.to_string_lossy().into_owned());
        last.filter(|_| is_path).unwrap_or_else(|| source.to_owned())
    };
    let mut output = serde_json::json!({ "shard_size": job.output.shard_size, "dtype": job.output.dtype });
    if let Some(structured) = parts.structured {
        output["layout"] = serde_json::json!(structured.layout);
        if let Some(devices) = job.output.tensor_parallel {
            output["tensor_parallel"] = serde_json::json!(devices);
        }
    }
    serde_json::json!({
        "model": { "source": name(&job.model.source), "fingerprint": parts.model },
        "calibration": {
            "source": name(&job.calibration.source),
            "samples": job.calibration.samples,
            "sequence_length": job.calibration.sequence_length,
            "seed": job.calibration.seed,
            "held_out": job.held_out(),
            "tokens_sha256": parts.tokens,
        },
        "method": { "name": job.method.name, "version": parts.method_version, "params": parts.method_params },
        "pattern": told_pattern(parts),
        "propagation": job.propagation,
        "output": output,
    })
}

/// The pattern with its default filled in.
fn told_pattern(parts: &Parts<'_>) -> PatternSpec {
    let mut pattern = parts.job.pattern.clone();
    if pattern.nofm.is_none() && !parts.imports_zeros {
        pattern.sparsity = parts.job.pattern().ok().map(|pattern| pattern.sparsity());
    }
    pattern
}

fn model_card(parts: &Parts<'_>) -> String {
    let job = parts.job;
    let what = match parts.structured {
        Some(record) => format!(
            "Whole attention heads and feed-forward channels, {:.2} % of the layers' parameters, were removed",
            record.removed_share() * 100.0
        ),
        None => {
            let pattern = match job.pattern() {
                _ if parts.imports_zeros => Pattern::Imported.to_string(),
                pattern => pattern.map_or_else(|_| String::new(), |pattern| pattern.to_string()),
            };
            format!("The linear layers of the decoder were pruned to {pattern}")
        }
    };
    let told = serde_json::to_string_pretty(&told_job(parts)).expect("a job is plain data");
    let base = job.model.source.strip_prefix("hf://").map_or_else(String::new, |name| {
        let name = name.split('@').next().unwrap_or(name);
        format!("base_model: {name}\nbase_model_relation: finetune\n")
    });
    format!(
        "---\n{base}library_name: transformers\ntags:\n- pruned\n- sparsity\n- espalier\n---\n\n\
         # Pruned with Espalier\n\n\
         {what} with method `{}`. Zeros are exact; embeddings and head\n\
         are untouched. `espalier.json` holds the SHA-256 of every file.\n\n\
         ```json\n{told}\n```\n",
        job.method.name,
    )
}

/// `espalier.json`.
#[derive(Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) espalier: String,
    pub(crate) job: serde_json::Value,
    pub(crate) files: BTreeMap<String, Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) structured: Option<StructuredRecord>,
}

fn manifest(parts: &Parts<'_>, files: &BTreeMap<String, Digest>) -> Vec<u8> {
    let manifest = Manifest {
        espalier: env!("CARGO_PKG_VERSION").to_owned(),
        job: told_job(parts),
        files: files.clone(),
        structured: parts.structured.cloned(),
    };
    serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data")
}
