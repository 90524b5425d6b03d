//! Tests of GGUF reading against `tests/golden/gguf`, made by `tests/reference/gguf_golden.py`.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::checkpoint::open;
use crate::digest::Digest;
use crate::fault::{Fault, FaultClass};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/gguf").join(name)
}

fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden("expected.json")).unwrap()).unwrap()
}

fn described(shape: &[usize], bytes: &[u8]) -> Value {
    json!({ "shape": shape, "sha256": Digest::of(bytes).to_string() })
}

#[test]
fn every_storage_type_is_widened_to_the_bit() {
    let expected = expected();
    let path = golden("llama.gguf");
    let file = File::open(&path).unwrap();
    let front = Front::read(&path, &file).unwrap();
    let mut kinds = Vec::new();
    for tensor in &front.tensors {
        let stored = read_at(&path, &file, tensor.start, tensor.length).unwrap();
        let widened = bytes_from_f32(Dtype::F32, &tensor.kind.widen(&stored));
        let found = described(&tensor.shape, &widened);
        assert_eq!(found, expected["stored"][&tensor.name], "{} {:?}", tensor.name, tensor.kind);
        if !kinds.contains(&tensor.kind) {
            kinds.push(tensor.kind);
        }
    }
    assert_eq!(kinds.len(), 9, "the golden file has a tensor of each type");
}

#[test]
fn tensors_have_the_names_and_rows_of_hugging_face() {
    let expected = expected();
    let checkpoint = open(&golden("llama.gguf")).unwrap();
    let presented = expected["presented"].as_object().unwrap();
    assert_eq!(checkpoint.names().len(), presented.len());
    for (name, expected) in presented {
        let header = checkpoint.header(name).unwrap();
        let whole = checkpoint.read(name).unwrap();
        assert_eq!(header.dtype, Dtype::Bf16);
        assert_eq!(&described(&header.shape, &whole), expected, "{name}");
        let count = header.shape[0];
        let row = whole.len() / count;
        for rows in [0..1, 3..count, 5..6, 2..2] {
            let part = &whole[rows.start * row..rows.end * row];
            assert_eq!(checkpoint.read_rows(name, rows.clone()).unwrap(), part, "{name} {rows:?}");
        }
        assert!(matches!(checkpoint.read_rows(name, 0..count + 1), Err(CheckpointError::RowsOutOfRange { .. })));
    }
    assert!(checkpoint.header("lm_head.weight").is_none(), "tied");
}

#[test]
fn config_is_that_of_the_model() {
    let checkpoint = open(&golden("llama.gguf")).unwrap();
    let expected = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "vocab_size": 16,
    });
    assert_eq!(checkpoint.config(), &expected);
}

#[test]
fn sentence_piece_merges_come_best_score_first() {
    let files = open(&golden("llama.gguf")).unwrap().companion_files().unwrap();
    let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    let tokenizer: Value = serde_json::from_slice(&files[1].1).unwrap();
    assert_eq!(tokenizer["model"]["merges"], expected()["merges"]);
    assert_eq!(tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
    assert_eq!(tokenizer["added_tokens"].as_array().unwrap().len(), 3);
}

#[test]
fn any_cut_of_a_file_is_refused() {
    let bytes = fs::read(golden("llama.gguf")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut.gguf");
    for length in (0..bytes.len()).step_by(bytes.len() / 199) {
        fs::write(&path, &bytes[..length]).unwrap();
        let error = open(&path).map(drop).unwrap_err();
        assert!(matches!(error, CheckpointError::Truncated { .. }), "{length}: {error}");
        assert!(error.to_string().contains("cut.gguf"));
    }
}

#[test]
fn damaged_bytes_never_panic() {
    let bytes = fs::read(golden("llama.gguf")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("damaged.gguf");
    fs::write(&path, &bytes).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for at in 0..1500.min(bytes.len()) {
        for value in [0, 0xff, bytes[at] ^ 0x80] {
            file.write_all_at(&[value], at as u64).unwrap();
            if let Ok(checkpoint) = open(&path) {
                for name in checkpoint.names() {
                    let _ = checkpoint.read_rows(name, 0..1);
                }
                let _ = checkpoint.companion_files();
            }
        }
        file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
}

/// A GGUF file of these keys and no tensor.
fn file_of(version: u32, pairs: &[(&str, u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend((pairs.len() as u64).to_le_bytes());
    for (key, kind, value) in pairs {
        bytes.extend(text(key));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
    }
    bytes
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

#[test]
fn absurd_metadata_is_refused_before_anything_is_allocated() {
    let architecture = |name: &str| ("general.architecture", 8, text(name));
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()[..]].concat();
    let nested: Vec<u8> = (0..200).flat_map(|_| list(9, 1)).collect();
    let mut counts = b"GGUF\x03\0\0\0".to_vec();
    counts.extend([0xff; 16]);
    let cases = [
        ("no magic", b"GGML\x03\0\0\0".to_vec(), "is no checkpoint"),
        ("version", file_of(7, &[]), "key GGUF.version of"),
        ("counts", counts, "are needed for GGUF.kv_count"),
        ("long string", file_of(3, &[("k", 8, u64::MAX.to_le_bytes().to_vec())]), "are needed for k"),
        ("long list", file_of(3, &[("k", 9, list(4, u64::MAX))]), "are needed for k"),
        ("nested lists", file_of(3, &[("k", 9, nested)]), "key k of"),
        ("unknown type", file_of(3, &[("k", 99, vec![])]), "has a type that GGUF does not know"),
        ("key twice", file_of(3, &[("k", 0, vec![1]), ("k", 0, vec![1])]), "is given twice"),
        ("alignment", file_of(3, &[("general.alignment", 4, vec![0; 4])]), "key general.alignment of"),
        ("no architecture", file_of(3, &[]), "key general.architecture of"),
        ("other architecture", file_of(3, &[architecture("gemma")]), "holds a model of architecture gemma"),
        ("no width", file_of(3, &[architecture("llama")]), "key llama.embedding_length of"),
    ];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bad.gguf");
    for (case, bytes, expected) in cases {
        fs::write(&path, bytes).unwrap();
        let error = open(&path).map(drop).unwrap_err();
        let line = Fault::new(error.class(), &error).message;
        assert_eq!(error.class(), FaultClass::Reject, "{case}");
        assert!(line.contains(expected) && line.contains("bad.gguf"), "{case}: {line}");
    }
}
