//! Tests of the safetensors reader: what it reads, and every way in which it refuses.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::fault::{Fault, FaultClass};

/// A safetensors file of a JSON header and `data` bytes of data.
fn file_of(header: &Value, data: usize) -> Vec<u8> {
    file_of_text(&header.to_string(), data)
}

fn file_of_text(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend((0..data).map(|byte| byte as u8));
    bytes
}

fn tensor(dtype: &str, shape: Value, start: u64, end: u64) -> Value {
    json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] })
}

/// A directory with a config and these files.
fn directory_of(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("config.json"), r#"{"model_type":"llama"}"#).unwrap();
    for (name, bytes) in files {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

fn open_error(path: &Path) -> String {
    let error = open(path).map(|_| ()).unwrap_err();
    assert_eq!(error.class(), FaultClass::Reject, "{error}");
    let line = Fault::new(error.class(), &error).message;
    assert!(!line.contains('\n'));
    line
}

#[test]
fn tensors_are_read_whole_and_by_row() {
    let header = json!({
        "__metadata__": { "format": "pt" },
        "b": tensor("F32", json!([2, 2]), 6, 22),
        "a": tensor("BF16", json!([3]), 0, 6),
        "ids": tensor("I64", json!([1]), 22, 30),
        "empty": tensor("F16", json!([0, 4]), 30, 30),
    });
    let directory = directory_of(&[("model.safetensors", file_of(&header, 30))]);
    let checkpoint = open(directory.path()).unwrap();
    assert_eq!(checkpoint.names(), ["a", "b", "empty"]);
    assert_eq!(checkpoint.other_names(), ["ids"]);
    assert_eq!(checkpoint.header("b"), Some(&TensorHeader { dtype: Dtype::F32, shape: vec![2, 2] }));
    assert_eq!(checkpoint.header("ids"), None);
    assert_eq!(checkpoint.read("a").unwrap(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(checkpoint.read_rows("b", 1..2).unwrap(), [14, 15, 16, 17, 18, 19, 20, 21]);
    assert_eq!(checkpoint.read_rows("b", 2..2).unwrap(), [0u8; 0]);
    assert_eq!(checkpoint.read("empty").unwrap(), [0u8; 0]);
    assert_eq!(checkpoint.config()["model_type"], "llama");

    let message = |result: Result<Vec<u8>, CheckpointError>| result.unwrap_err().to_string();
    assert!(message(checkpoint.read("ids")).contains("tensor ids of"));
    assert!(message(checkpoint.read("ids")).ends_with("is stored as I64, which is not read as floats"));
    assert!(message(checkpoint.read("c")).ends_with("has no tensor c"));
    assert!(message(checkpoint.read_rows("b", 1..3)).starts_with("rows 1..3 of tensor b of"));
}

#[test]
fn shards_are_found_through_the_index() {
    let index = json!({ "metadata": {}, "weight_map": { "x": "s2", "y": "s1", "z": "s2" } });
    let files = [
        (
            "s1",
            file_of(&json!({ "y": tensor("F16", json!([1]), 0, 2), "unlisted": tensor("F16", json!([1]), 2, 4) }), 4),
        ),
        ("s2", file_of(&json!({ "z": tensor("F16", json!([1]), 0, 2), "x": tensor("F16", json!([1]), 2, 4) }), 4)),
        ("model.safetensors.index.json", index.to_string().into_bytes()),
    ];
    let directory = directory_of(&files);
    let checkpoint = open(directory.path()).unwrap();
    assert_eq!(checkpoint.names(), ["y", "z", "x"]);
    assert_eq!(checkpoint.read("x").unwrap(), [2, 3]);
    assert!(checkpoint.header("unlisted").is_none());
}

#[test]
fn companions_are_taken_and_weights_are_not() {
    let taken = ["LICENSE.txt", "USE_POLICY.md", "chat_template.jinja", "tokenizer.json", "vocab.json"];
    let left = ["README.md", "consolidated.00.pth", "pytorch_model.bin", "model.gguf", "modeling_x.py"];
    let mut files: Vec<_> = taken.iter().chain(&left).map(|&name| (name, name.as_bytes().to_vec())).collect();
    files.push(("model.safetensors", file_of(&json!({}), 0)));
    let directory = directory_of(&files);
    fs::create_dir(directory.path().join("original")).unwrap();
    fs::write(directory.path().join("original/tokenizer.model"), b"x").unwrap();
    let companions = open(directory.path()).unwrap().companion_files().unwrap();
    assert_eq!(companions, taken.map(|name| (name.to_owned(), name.as_bytes().to_vec())));
}

#[test]
fn malformed_files_are_refused_in_one_line_that_names_file_and_tensor() {
    let mut absurd = u64::MAX.to_le_bytes().to_vec();
    absurd.extend_from_slice(b"{}");
    let mut beyond = 100u64.to_le_bytes().to_vec();
    beyond.extend_from_slice(b"{}");
    let huge = json!({ "w": tensor("F32", json!([u64::MAX, u64::MAX]), 0, 4) });
    let twice = r#"{"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"w":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}"#;
    let nested = format!("{{\"w\":{}", "[".repeat(10_000));
    let two = |a: (u64, u64), b: (u64, u64)| {
        let shape = |(start, end): (u64, u64)| json!([(end - start) / 2]);
        json!({ "v": tensor("F16", shape(a), a.0, a.1), "w": tensor("F16", shape(b), b.0, b.1) })
    };
    let one = |dtype, shape, start, end| json!({ "w": tensor(dtype, shape, start, end) });
    let cases = [
        ("empty file", vec![], "is truncated"),
        ("short length", vec![0; 7], "is truncated"),
        ("absurd header length", absurd, "is too large: the header has 18446744073709551615 bytes"),
        ("header beyond the end", beyond, "108 are needed for the header"),
        ("not json", file_of_text("{\"w\": ", 0), "is not valid JSON"),
        ("not an object", file_of_text("[1]", 0), "expected an object of tensors"),
        ("deeply nested", file_of_text(&nested, 0), "is not valid JSON"),
        (
            "missing field",
            file_of(&json!({ "w": { "dtype": "F16", "shape": [1] } }), 2),
            "missing field `data_offsets`",
        ),
        ("negative shape", file_of(&one("F16", json!([-1]), 0, 2), 2), "is not valid JSON"),
        ("listed twice", file_of_text(twice, 4), "tensor w of {} is listed twice"),
        ("offsets reversed", file_of(&one("F16", json!([1]), 2, 0), 2), "tensor w of {} ends before it starts"),
        ("data truncated", file_of(&one("F16", json!([4]), 0, 8), 6), "are needed for tensor w"),
        ("offsets overflow", file_of(&one("F16", json!([1]), u64::MAX - 2, u64::MAX), 2), "tensor w of {} has offsets"),
        ("wrong length", file_of(&one("F16", json!([3]), 0, 4), 4), "tensor w of {} has 4 bytes, but F16 [3] needs 6"),
        ("shape overflow", file_of(&huge, 4), "tensor w of {} has a shape of more than 2^64 bytes"),
        ("overlap", file_of(&two((0, 4), (2, 6)), 6), "tensors v and w of {} overlap"),
        ("hole before", file_of(&one("F16", json!([1]), 2, 4), 4), "bytes 0..2 of the data of {} belong to no tensor"),
        ("hole between", file_of(&two((0, 2), (4, 6)), 6), "bytes 2..4 of the data of {} belong to no tensor"),
        ("hole after", file_of(&one("F16", json!([1]), 0, 2), 5), "bytes 2..5 of the data of {} belong to no tensor"),
    ];
    for (case, bytes, expected) in cases {
        let directory = directory_of(&[("model.safetensors", bytes)]);
        let path = directory.path().join("model.safetensors");
        let line = open_error(directory.path());
        assert!(line.contains(&path.display().to_string()), "{case}: {line}");
        assert!(line.contains(&expected.replace("{}", &path.display().to_string())), "{case}: {line}");
    }
}

#[test]
fn unusable_directories_are_refused() {
    let shard = || file_of(&json!({ "w": tensor("F16", json!([1]), 0, 2) }), 2);
    let index = |map: Value| json!({ "weight_map": map }).to_string().into_bytes();
    let name = "model.safetensors.index.json";
    let cases: [(&str, Vec<_>, &str); 9] = [
        ("nothing there", vec![], "is no checkpoint"),
        ("index is not json", vec![(name, b"{".to_vec())], "is not valid JSON"),
        ("index without map", vec![(name, b"{}".to_vec())], "missing field `weight_map`"),
        ("index of nothing", vec![(name, index(json!({})))], "key weight_map of"),
        ("missing shard", vec![(name, index(json!({ "w": "s1" })))], "places tensor w in s1, which does not exist"),
        ("missing tensor", vec![(name, index(json!({ "x": "s1" }))), ("s1", shard())], "s1 has no tensor x"),
        ("shard elsewhere", vec![(name, index(json!({ "w": "../s1" })))], "key weight_map.w of"),
        (
            "config is not json",
            vec![("model.safetensors", shard()), ("config.json", b"{".to_vec())],
            "config.json is not",
        ),
        ("config is a list", vec![("model.safetensors", shard()), ("config.json", b"[]".to_vec())], "key (root) of"),
    ];
    for (case, files, expected) in cases {
        let directory = directory_of(&files);
        let line = open_error(directory.path());
        assert!(line.contains(expected), "{case}: {line}");
        assert!(line.contains(&directory.path().display().to_string()), "{case}: {line}");
    }
    let directory = directory_of(&[("model.safetensors", shard())]);
    fs::remove_file(directory.path().join("config.json")).unwrap();
    assert!(open_error(directory.path()).ends_with("config.json does not exist"));
    assert!(open_error(&directory.path().join("nowhere")).ends_with("nowhere does not exist"));
    assert!(open_error(&directory.path().join("model.safetensors")).contains("is no checkpoint"));
}
