//! Writes the logits of Espalier's own forward pass, for `tests/reference/open_in_transformers.py --logits`:
//! `cargo run --release -p espalier-worker --example logits -- CHECKPOINT LOGITS.safetensors`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use espalier_common::checkpoint;
use espalier_common::ids::LayerIndex;
use espalier_worker::model;
use safetensors::tensor::{Dtype, TensorView};

/// Length of the one sequence.
const TOKENS: u32 = 64;
/// A prime: its multiples, modulo the vocabulary, spread over all of it.
const STRIDE: u32 = 7919;

fn main() -> Result<()> {
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(source), Some(target), None) = (paths.next(), paths.next(), paths.next()) else {
        anyhow::bail!("usage: logits CHECKPOINT LOGITS.safetensors");
    };
    let decoder = model::open(checkpoint::open(&source)?, &Device::Cpu)?;
    let vocabulary = u32::try_from(decoder.vocabulary_size())?;
    let tokens: Vec<u32> = (1..=TOKENS).map(|index| index * STRIDE % vocabulary).collect();
    let mut hidden = decoder.embed(&tokens)?;
    for layer in 0..decoder.layers() {
        hidden = decoder.load_layer(LayerIndex(u32::try_from(layer)?))?.forward(&hidden)?;
    }
    write(&target, &tokens, &decoder.load_head()?.logits(&hidden)?)
}

/// Writes `input_ids` `[tokens]` and `logits` `[tokens, vocabulary]`.
fn write(target: &Path, tokens: &[u32], logits: &Tensor) -> Result<()> {
    let values: Vec<u8> = logits.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
    let ids: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let tensors = BTreeMap::from([
        ("input_ids", TensorView::new(Dtype::U32, vec![tokens.len()], &ids)?),
        ("logits", TensorView::new(Dtype::F32, logits.dims().to_vec(), &values)?),
    ]);
    safetensors::serialize_to_file(tensors, None, target).with_context(|| target.display().to_string())
}
