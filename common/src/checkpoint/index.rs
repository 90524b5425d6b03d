//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use super::json::read_json;

/// Name of a checkpoint's only file of tensors.
pub(super) const SINGLE_FILE: &str = "model.safetensors";
/// Name of the index over several.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The index as it is stored.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Index {
    /// Totals over all shards; what other programs put there is not read.
    #[serde(default)]
    pub(super) metadata: serde_json::Map<String, serde_json::Value>,
    /// Tensor name to file name.
    pub(super) weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the index of `directory` and checks that its shards are plain names of files that exist.
    ///
    /// # Errors
    /// `NotFound`, `TooLarge`, `InvalidJson`, `InvalidKey`, `MissingShard`.
    pub(super) fn read(directory: &Path) -> Result<Self, CheckpointError> {
        let index = Self::read_alone(directory)?;
        for (tensor, shard) in &index.weight_map {
            if !directory.join(shard).is_file() {
                let (shard, tensor) = (shard.clone(), tensor.clone());
                return Err(CheckpointError::MissingShard { path: directory.join(INDEX_FILE), shard, tensor });
            }
        }
        Ok(index)
    }

    /// The names of the shards, which need not be there yet; each once, in order.
    ///
    /// # Errors
    /// Those of [`Self::read`], less `MissingShard`.
    pub(super) fn shard_names(directory: &Path) -> Result<BTreeSet<String>, CheckpointError> {
        Ok(Self::read_alone(directory)?.weight_map.into_values().collect())
    }

    fn read_alone(directory: &Path) -> Result<Self, CheckpointError> {
        let path = directory.join(INDEX_FILE);
        let index: Self = read_json(&path)?;
        for (tensor, shard) in &index.weight_map {
            let mut components = Path::new(shard).components();
            if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
                let (key, problem) = (format!("weight_map.{tensor}"), "is not the name of a file beside the index");
                return Err(CheckpointError::InvalidKey { path, key, problem });
            }
        }
        if index.weight_map.is_empty() {
            return Err(CheckpointError::InvalidKey { path, key: "weight_map".to_owned(), problem: "names no tensor" });
        }
        Ok(index)
    }
}
