//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use super::folder::Folder;

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
    /// Reads the index of `folder` and checks that its shards are plain names of files that exist.
    ///
    /// # Errors
    /// `NotFound`, `TooLarge`, `InvalidJson`, `InvalidKey`, `MissingShard`.
    pub(super) fn read(folder: &Folder) -> Result<Self, CheckpointError> {
        let index = Self::read_alone(folder)?;
        // Each shard is asked for once: there may be a thousand tensors in it.
        let shards: BTreeMap<&String, &String> =
            index.weight_map.iter().rev().map(|(tensor, shard)| (shard, tensor)).collect();
        for (shard, tensor) in shards {
            if !folder.has(shard)? {
                let (shard, tensor) = (shard.clone(), tensor.clone());
                return Err(CheckpointError::MissingShard { path: folder.file(INDEX_FILE), shard, tensor });
            }
        }
        Ok(index)
    }

    /// The names of the shards, which need not be there yet; each once, in order.
    ///
    /// # Errors
    /// Those of [`Self::read`], less `MissingShard`.
    pub(super) fn shard_names(folder: &Folder) -> Result<BTreeSet<String>, CheckpointError> {
        Ok(Self::read_alone(folder)?.weight_map.into_values().collect())
    }

    fn read_alone(folder: &Folder) -> Result<Self, CheckpointError> {
        let path = folder.file(INDEX_FILE);
        let index: Self = folder.read_json(INDEX_FILE)?;
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
