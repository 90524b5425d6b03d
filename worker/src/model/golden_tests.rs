//! Every family against the logits that transformers computed (`tests/reference/families.py`).

use std::path::{Path, PathBuf};

use candle_core::safetensors::load;
use espalier_common::checkpoint;

use super::*;
use crate::linalg::ops::host;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families")
}

fn logits(decoder: &dyn Decoder, tokens: &[u32]) -> Tensor {
    let mut hidden = decoder.embed(tokens).unwrap();
    for layer in 0..decoder.layers() {
        let layer = LayerIndex(layer as u32);
        decoder.outline(layer).unwrap();
        hidden = decoder.load_layer(layer).unwrap().forward(&hidden).unwrap();
    }
    decoder.load_head().unwrap().logits(&hidden).unwrap()
}

/// Largest |ours − theirs| over largest |theirs|.
fn deviation(fixture: &str, device: &Device) -> f32 {
    let directory = fixtures().join(fixture);
    let decoder = open(checkpoint::open(&directory).unwrap(), device).unwrap();
    let golden = load(directory.join("golden.safetensors"), &Device::Cpu).unwrap();
    let tokens: Vec<u32> = golden["tokens"].to_vec1::<i32>().unwrap().into_iter().map(|token| token as u32).collect();
    let ours = logits(decoder.as_ref(), &tokens).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let theirs = golden["logits"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
    ours.iter().zip(&theirs).fold(0.0, |max: f32, (a, b)| max.max((a - b).abs())) / largest
}

macro_rules! agrees_with_transformers {
    ($($name:ident: $fixture:literal,)*) => {$(
        #[test]
        fn $name() {
            for device in host::devices() {
                let deviation = deviation($fixture, &device);
                assert!(deviation <= 2e-4, "logits of {} deviate by {deviation:e} on {device:?}", $fixture);
            }
        }
    )*};
}

agrees_with_transformers! {
    llama_with_as_many_kv_heads_as_heads: "llama-mha",
    llama_with_grouped_queries_and_a_tied_head: "llama-gqa-tied",
    llama_with_biases: "llama-biases",
    llama_with_its_own_head_width: "llama-head-dim",
    llama_with_llama3_rope: "llama-rope-llama3",
    llama_with_linear_rope: "llama-rope-linear",
    llama_with_dynamic_rope_beyond_its_positions: "llama-rope-dynamic",
    mistral_beyond_its_window: "mistral-window",
    qwen2: "qwen2",
    qwen2_with_windows_in_its_upper_layers: "qwen2-window",
    qwen3: "qwen3",
    opt: "opt",
    opt_with_projections_and_norms_after: "opt-projected-post-norm",
    opt_without_biases_and_affine_norms: "opt-no-bias",
    opt_with_gelu_and_its_own_head: "opt-gelu-untied",
}
