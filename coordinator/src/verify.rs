//! What stock loaders would hold against a checkpoint, as far as files and config tell without knowing families.

use std::path::Path;

use espalier_common::checkpoint::Checkpoint;
use espalier_common::checkpoint::cast::f32_from_bytes;
use espalier_common::digest::Digest;
use espalier_common::store::{BlobStore, LocalStore};
use serde_json::Value;

use crate::assemble::{Manifest, digest_of};

/// `model_type`s whose config class refuses a hidden width that the heads do not divide, even with a head_dim.
///
/// Source: transformers 5, `LlamaConfig.validate_architecture`.
const HEADS_DIVIDE_WIDTH: [&str; 1] = ["llama"];

/// `model_type`s that come with code of their own.
const NOT_STOCK: [&str; 1] = ["nemotron-nas"];

/// Every finding, one line each; none if there is nothing wrong.
pub fn findings(checkpoint: &dyn Checkpoint) -> Vec<String> {
    let config = checkpoint.config();
    let mut found = heads(config);
    found.extend(leftovers(config));
    found.extend(tied(config, checkpoint));
    found.extend(foreign_classes(config));
    found.extend(damaged(checkpoint.path()));
    found.extend(wrong_total(checkpoint));
    if quantised(config).is_none() {
        found.extend(checkpoint.other_names().iter().map(|name| format!("{name} holds no floats")));
    }
    for name in checkpoint.names() {
        let Some(header) = checkpoint.header(name) else { continue };
        match checkpoint.read(name) {
            Ok(bytes) => {
                let bad = f32_from_bytes(header.dtype, &bytes).iter().filter(|value| !value.is_finite()).count();
                if bad > 0 {
                    found.push(format!("{name} has {bad} values that are NaN or infinite"));
                }
            }
            Err(error) => found.push(format!("{name} cannot be read: {error}")),
        }
    }
    found
}

/// How a checkpoint was quantised, if its config says that it was: runtimes then read its tensors in ways of their own.
pub fn quantised(config: &Value) -> Option<&str> {
    let quantization = config.get("quantization_config").filter(|quantization| !is_empty(quantization))?;
    Some(quantization["quant_method"].as_str().unwrap_or("in a way that it does not name"))
}

/// An index that counts other bytes than its shards hold: a shard was replaced, or belongs to another checkpoint.
fn wrong_total(checkpoint: &dyn Checkpoint) -> Option<String> {
    let name = "model.safetensors.index.json";
    let index: Value = serde_json::from_slice(&std::fs::read(checkpoint.path().join(name)).ok()?).ok()?;
    let told = index["metadata"]["total_size"].as_u64()?;
    let headers = checkpoint.names().into_iter().filter_map(|name| checkpoint.header(name));
    let held: u64 = headers.map(|header| header.bytes() as u64).sum();
    (told != held && checkpoint.other_names().is_empty())
        .then(|| format!("{name} has metadata.total_size = {told}, but the tensors have {held} bytes"))
}

fn number(config: &Value, key: &str) -> Option<u64> {
    config.get(key).and_then(Value::as_u64).filter(|number| *number > 0)
}

fn heads(config: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let heads = number(config, "num_attention_heads");
    if let (Some(heads), Some(kv_heads)) = (heads, number(config, "num_key_value_heads"))
        && !heads.is_multiple_of(kv_heads)
    {
        found.push(format!("num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}"));
    }
    if let (Some(heads), Some(hidden)) = (heads, number(config, "hidden_size"))
        && !hidden.is_multiple_of(heads)
    {
        let strict = config["model_type"].as_str().is_some_and(|kind| HEADS_DIVIDE_WIDTH.contains(&kind));
        if strict {
            found.push(format!(
                "num_attention_heads = {heads} does not divide hidden_size = {hidden}, which transformers 5 refuses"
            ));
        } else if number(config, "head_dim").is_none() {
            found.push(format!(
                "num_attention_heads = {heads} does not divide hidden_size = {hidden}, and there is no head_dim"
            ));
        }
    }
    found
}

/// Config classes that stock loaders do not have, and that must lie beside the checkpoint.
fn foreign_classes(config: &Value) -> Option<String> {
    let kind = config["model_type"].as_str().filter(|kind| NOT_STOCK.contains(kind))?;
    let brings_them = config.get("auto_map").is_some_and(|map| !is_empty(map));
    (!brings_them).then(|| {
        format!("model_type {kind} is none that transformers and vLLM know without NVIDIA's config class beside it")
    })
}

/// Files that are not what the checkpoint's own `espalier.json` says, if it has one.
fn damaged(folder: &Path) -> Vec<String> {
    // A checkpoint that is no folder of this machine has no manifest to look at here.
    let Ok(store) = LocalStore::open(folder) else { return Vec::new() };
    let manifest = store.get("espalier.json").ok();
    let Some(manifest) = manifest.and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok()) else {
        return Vec::new();
    };
    let finding = |(name, digest): (String, Digest)| match digest_of(&store, &name) {
        Ok(found) => {
            (found != digest).then(|| format!("{name} is not what espalier.json says: its SHA-256 is {found}"))
        }
        Err(error) => Some(format!("{name}, which espalier.json names, cannot be read: {error}")),
    };
    manifest.files.into_iter().filter_map(finding).collect()
}

fn leftovers(config: &Value) -> Vec<String> {
    let places = [("", config), ("quantization_config.", &config["quantization_config"])];
    let left = places.iter().filter(|(_, place)| place.get("sparsity_config").is_some_and(|left| !is_empty(left)));
    left.map(|(prefix, _)| format!("config.json still has {prefix}sparsity_config, which current loaders refuse"))
        .collect()
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}

fn tied(config: &Value, checkpoint: &dyn Checkpoint) -> Option<String> {
    let head = "lm_head.weight";
    let embedding = checkpoint.names().into_iter().find(|name| name.ends_with("embed_tokens.weight"))?.to_owned();
    if config.get("tie_word_embeddings") != Some(&Value::Bool(true)) || checkpoint.header(head).is_none() {
        return None;
    }
    let same = checkpoint.read(head).ok().zip(checkpoint.read(&embedding).ok()).is_some_and(|(a, b)| a == b);
    (!same).then(|| format!("tie_word_embeddings is true, but {head} is not {embedding}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn heads_that_divide_nothing_are_found() {
        assert!(heads(&json!({ "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576 })).is_empty());
        let wrong = json!({ "num_attention_heads": 9, "num_key_value_heads": 2, "hidden_size": 576 });
        assert_eq!(heads(&wrong).len(), 1);
        let narrow = json!({ "model_type": "llama", "num_attention_heads": 24, "hidden_size": 4096, "head_dim": 128 });
        assert!(heads(&narrow)[0].contains("24 does not divide hidden_size = 4096"));
        let other = json!({ "model_type": "qwen3", "num_attention_heads": 24, "hidden_size": 4096, "head_dim": 128 });
        assert!(heads(&other).is_empty());
    }

    #[test]
    fn a_class_that_no_stock_loader_has_is_found() {
        assert!(foreign_classes(&json!({ "model_type": "llama" })).is_none());
        let found = foreign_classes(&json!({ "model_type": "nemotron-nas" })).unwrap();
        assert!(found.contains("nemotron-nas"), "{found}");
        let whole = json!({ "model_type": "nemotron-nas", "auto_map": { "AutoConfig": "x.Y" } });
        assert!(foreign_classes(&whole).is_none());
    }

    #[test]
    fn files_that_changed_since_they_were_written_are_found() {
        let folder = tempfile::tempdir().unwrap();
        assert!(damaged(folder.path()).is_empty(), "not every checkpoint is ours");
        std::fs::write(folder.path().join("a"), "whole").unwrap();
        std::fs::write(folder.path().join("b"), "other").unwrap();
        let files = json!({ "a": Digest::of(b"whole"), "b": Digest::of(b"whole"), "../c": Digest::of(b"whole") });
        let manifest = json!({ "espalier": "0", "job": {}, "files": files });
        std::fs::write(folder.path().join("espalier.json"), manifest.to_string()).unwrap();
        let found = damaged(folder.path());
        assert!(found.len() == 2 && found[0].contains("../c") && found[1].starts_with("b is not"), "{found:?}");
    }

    #[test]
    fn a_quantised_checkpoint_is_told_by_its_config() {
        assert_eq!(quantised(&json!({ "quantization_config": {} })), None);
        assert_eq!(quantised(&json!({ "quantization_config": { "quant_method": "gptq" } })), Some("gptq"));
    }

    #[test]
    fn sparsity_configs_that_say_something_are_found() {
        assert!(leftovers(&json!({ "quantization_config": { "sparsity_config": {} } })).is_empty());
        let left = json!({ "quantization_config": { "sparsity_config": { "format": "sparse-bitmask" } } });
        assert!(leftovers(&left)[0].contains("quantization_config.sparsity_config"));
    }
}
