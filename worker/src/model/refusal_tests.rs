//! Checkpoints that must be refused, and by which name.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use espalier_common::checkpoint::{self, CheckpointError, TensorHeader};
use serde_json::{Value, json};

use super::*;

/// A checkpoint in memory, to be spoilt.
struct Spoilt {
    path: PathBuf,
    config: Value,
    tensors: BTreeMap<String, (TensorHeader, Vec<u8>)>,
}

impl Spoilt {
    fn from_fixture(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families").join(name);
        let whole = checkpoint::open(&path).unwrap();
        let tensor = |name: &str| (name.to_owned(), (whole.header(name).unwrap().clone(), whole.read(name).unwrap()));
        Self { config: whole.config().clone(), tensors: whole.names().into_iter().map(tensor).collect(), path }
    }

    fn with(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    fn open(self) -> Result<Box<dyn Decoder>, ModelError> {
        open(Arc::new(self), &Device::Cpu)
    }
}

impl Checkpoint for Spoilt {
    fn path(&self) -> &PathBuf {
        &self.path
    }

    fn file_of(&self, _: &str) -> &Path {
        &self.path
    }

    fn config(&self) -> &Value {
        &self.config
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn header(&self, name: &str) -> Option<&TensorHeader> {
        self.tensors.get(name).map(|(header, _)| header)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let missing = || CheckpointError::MissingTensor { path: self.path().clone(), tensor: name.to_owned() };
        self.tensors.get(name).map(|(_, bytes)| bytes.clone()).ok_or_else(missing)
    }

    fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
        let (header, bytes) = &self.tensors[name];
        let row = bytes.len() / header.shape[0];
        Ok(bytes[rows.start * row..rows.end * row].to_vec())
    }

    fn companion_files(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        Ok(Vec::new())
    }
}

fn refusal<T>(result: Result<T, ModelError>) -> String {
    result.err().expect("this had to be refused").to_string()
}

#[test]
fn configs_are_refused_by_key() {
    for (fixture, key, value) in [
        ("llama-mha", "hidden_size", Value::Null),
        ("llama-mha", "intermediate_size", json!(0)),
        ("llama-mha", "vocab_size", json!(1u64 << 40)),
        ("llama-mha", "num_hidden_layers", json!(1_000_000)),
        ("llama-mha", "num_key_value_heads", json!(3)),
        ("llama-mha", "hidden_act", json!("gelu")),
        ("llama-mha", "attention_bias", json!("yes")),
        ("llama-mha", "rms_norm_eps", json!(-1.0)),
        ("qwen3", "head_dim", Value::Null),
        ("qwen2-window", "layer_types", json!(["full_attention"])),
        ("mistral-window", "sliding_window", json!("7")),
        ("opt", "activation_function", json!("tanh")),
        ("opt", "ffn_dim", Value::Null),
    ] {
        let message = refusal(Spoilt::from_fixture(fixture).with(key, value).open());
        assert!(message.contains(key), "{fixture}: {message}");
    }
}

#[test]
fn heads_that_do_not_divide_the_hidden_size_are_refused() {
    for fixture in ["llama-mha", "opt"] {
        let spoilt = Spoilt::from_fixture(fixture).with("num_attention_heads", json!(5));
        let message = refusal(spoilt.with("num_key_value_heads", json!(5)).with("head_dim", Value::Null).open());
        assert!(message.contains("hidden_size") && message.contains("5"), "{message}");
    }
}

#[test]
fn unknown_architectures_are_refused_with_what_is_known() {
    let message = refusal(Spoilt::from_fixture("opt").with("architectures", json!(["GPT2LMHeadModel"])).open());
    assert!(message.contains("GPT2LMHeadModel") && message.contains("LlamaForCausalLM"), "{message}");
    assert!(refusal(Spoilt::from_fixture("opt").with("architectures", json!({})).open()).contains("none"));
}

#[test]
fn outlines_name_missing_and_misshapen_tensors() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut missing = Spoilt::from_fixture("llama-mha");
    missing.tensors.remove(name);
    let missing = missing.open().unwrap();
    assert!(missing.outline(LayerIndex(0)).is_ok());
    assert!(refusal(missing.outline(LayerIndex(1))).contains(name));
    assert!(refusal(missing.outline(LayerIndex(2))).contains("model.layers.2."));

    let mut misshapen = Spoilt::from_fixture("llama-mha");
    misshapen.tensors.get_mut(name).unwrap().0.shape.reverse();
    let misshapen = misshapen.open().unwrap();
    assert!(refusal(misshapen.outline(LayerIndex(1))).contains(name));
    assert!(refusal(misshapen.load_layer(LayerIndex(1))).contains(name));
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name() {
    for (bytes, name) in
        [(f32::NAN, "model.layers.0.mlp.up_proj.weight"), (f32::INFINITY, "model.layers.0.input_layernorm.weight")]
    {
        let mut spoilt = Spoilt::from_fixture("llama-mha");
        spoilt.tensors.get_mut(name).unwrap().1[8..12].copy_from_slice(&bytes.to_le_bytes());
        let message = refusal(spoilt.open().unwrap().load_layer(LayerIndex(0)));
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn tokens_and_lengths_are_bounded() {
    let decoder = Spoilt::from_fixture("opt").open().unwrap();
    assert!(matches!(decoder.embed(&[3, 64]), Err(ModelError::TokenOutOfRange { token: 64, vocabulary: 64 })));
    assert!(matches!(decoder.embed(&[0; 49]), Err(ModelError::SequenceTooLong { tokens: 49, limit: 48 })));
    assert_eq!(decoder.embed(&[0; 48]).unwrap().dims(), [48, 32]);
}

#[test]
fn outlines_list_groups_in_dataflow_order() {
    let outline = Spoilt::from_fixture("llama-gqa-tied").open().unwrap().outline(LayerIndex(1)).unwrap();
    let names: Vec<Vec<&str>> = outline
        .groups
        .iter()
        .map(|group| group.iter().map(|member| member.tensor.rsplit('.').nth(1).unwrap()).collect())
        .collect();
    let expected =
        [vec!["q_proj", "k_proj", "v_proj"], vec!["o_proj"], vec!["gate_proj", "up_proj"], vec!["down_proj"]];
    assert_eq!(names, expected);
    let k = &outline.groups[0][1];
    assert_eq!((k.rows, k.columns, k.dtype.as_str()), (16, 32, "F32"));
    let elements: usize = outline.sublayers().map(|sublayer| sublayer.elements()).sum();
    assert_eq!(outline.bytes, 4 * (elements as u64 + 2 * 32));
}

#[test]
fn a_shared_layer_keeps_its_weights_when_the_other_gets_new_ones() {
    for fixture in ["llama-mha", "opt"] {
        let decoder = Spoilt::from_fixture(fixture).open().unwrap();
        let mut layer = decoder.load_layer(LayerIndex(0)).unwrap();
        let hidden = decoder.embed(&[1, 2, 3]).unwrap();
        let dense = layer.forward(&hidden).unwrap().to_vec2::<f32>().unwrap();
        let copy = layer.share();
        let last = layer.groups() - 1;
        layer.set_weight(last, 0, layer.weight(last, 0).zeros_like().unwrap()).unwrap();
        assert_eq!(copy.forward(&hidden).unwrap().to_vec2::<f32>().unwrap(), dense);
        assert_ne!(layer.forward(&hidden).unwrap().to_vec2::<f32>().unwrap(), dense);
    }
}

#[test]
fn layers_of_their_own_widths_are_read_or_refused_by_key() {
    let open = |block: &Value, layers: usize| {
        let spoilt = Spoilt::from_fixture("llama-gqa-tied").with("architectures", json!(["DeciLMForCausalLM"]));
        spoilt.with("block_configs", json!(vec![block; layers])).open()
    };
    let block = |group: usize, ffn: Value| json!({ "attention": { "n_heads_in_group": group }, "ffn": ffn });
    let width = || json!({ "intermediate_size": 56 });
    let decoder = open(&block(2, width()), 2).unwrap();
    decoder.outline(LayerIndex(1)).unwrap();
    assert!(decoder.structure(AttentionUnit::KvHeads).only_masks());
    // A factor is rounded up to 256, which the tensors are not.
    assert!(open(&block(2, json!({ "ffn_mult": 0.5 })), 2).unwrap().outline(LayerIndex(0)).is_err());
    for (block, layers, key) in [
        (block(3, width()), 2, "n_heads_in_group"),
        (block(2, width()), 3, "block_configs"),
        (block(2, json!({ "ffn_mult": 1e9 })), 2, "ffn_mult"),
        (block(2, json!({ "no_op": true })), 2, "no_op"),
        (json!({ "ffn": width() }), 2, "attention"),
    ] {
        let message = refusal(open(&block, layers));
        assert!(message.contains(key), "{key}: {message}");
    }
}
