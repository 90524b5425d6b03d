//! The `config.json` that a GGUF file's metadata amounts to.

use serde_json::{Value, json};

use super::metadata::{Front, Value as Stored};
use crate::checkpoint::{CheckpointError, Dtype};

/// What reading the tensors needs to know of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Width of the residual stream.
    pub(super) hidden: u64,
    /// Decoder layers.
    pub(super) layers: u64,
    /// Query heads.
    pub(super) heads: u64,
    /// Key and value heads.
    pub(super) kv_heads: u64,
    /// Width of a head.
    pub(super) head_dim: u64,
}

impl Shape {
    /// Reads the shape of a llama model.
    ///
    /// # Errors
    /// `UnsupportedArchitecture`, `InvalidKey`.
    pub(super) fn read(front: &Front, path: &std::path::Path) -> Result<Self, CheckpointError> {
        let key = "general.architecture";
        match front.text(key)? {
            Some("llama") => {}
            None => return Err(front.invalid(key, "is missing")),
            Some(architecture) => {
                let (path, architecture) = (path.to_owned(), architecture.to_owned());
                return Err(CheckpointError::UnsupportedArchitecture { path, architecture });
            }
        }
        let hidden = required(front, "llama.embedding_length")?;
        let heads = uniform(front, "llama.attention.head_count")?
            .ok_or_else(|| front.invalid("llama.attention.head_count", "is missing"))?;
        let kv_heads = uniform(front, "llama.attention.head_count_kv")?.unwrap_or(heads);
        let key = "llama.attention.key_length";
        let head_dim = match front.integer(key)? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(front.invalid("llama.attention.head_count", "does not divide llama.embedding_length")),
        };
        if head_dim < 2 || head_dim % 2 != 0 || head_dim > 1 << 20 {
            return Err(front.invalid(key, "makes heads of an odd or absurd width"));
        }
        if front.integer("llama.rope.dimension_count")?.is_some_and(|rotated| rotated != head_dim) {
            return Err(
                front.invalid("llama.rope.dimension_count", "rotates a part of each head, which LLaMA does not")
            );
        }
        if front.integer("llama.attention.value_length")?.is_some_and(|width| width != head_dim) {
            return Err(front.invalid("llama.attention.value_length", "differs from the key length"));
        }
        Ok(Self { hidden, layers: required(front, "llama.block_count")?, heads, kv_heads, head_dim })
    }
}

/// Makes the config. `rope_factors` are those of the file's `rope_freqs`, if it has them.
///
/// # Errors
/// `InvalidKey`.
pub(super) fn config(
    front: &Front,
    shape: &Shape,
    dtype: Dtype,
    vocabulary: usize,
    rope_factors: Option<&[f32]>,
) -> Result<Value, CheckpointError> {
    let has = |name: &str| front.tensors.iter().any(|tensor| tensor.name == name);
    let theta = front.number("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let epsilon = "llama.attention.layer_norm_rms_epsilon";
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": has("blk.0.attn_q.bias"),
        "bos_token_id": front.integer("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": front.integer("tokenizer.ggml.eos_token_id")?,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": uniform(front, "llama.feed_forward_length")?
            .ok_or_else(|| front.invalid("llama.feed_forward_length", "is missing"))?,
        "max_position_embeddings": required(front, "llama.context_length")?,
        "mlp_bias": has("blk.0.ffn_up.bias"),
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": front.integer("tokenizer.ggml.padding_token_id")?,
        "rms_norm_eps": front.number(epsilon)?.ok_or_else(|| front.invalid(epsilon, "is missing"))?,
        "rope_scaling": rope_scaling(front, shape, theta, rope_factors)?,
        "rope_theta": theta,
        "tie_word_embeddings": !has("output.weight"),
        "torch_dtype": match dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
        },
        "vocab_size": vocabulary,
    });
    if let Some(object) = config.as_object_mut() {
        // Absent means the default; null is said only where transformers writes it.
        object.retain(|key, value| !value.is_null() || key == "rope_scaling");
    }
    Ok(config)
}

fn required(front: &Front, key: &str) -> Result<u64, CheckpointError> {
    match front.integer(key)? {
        Some(0) => Err(front.invalid(key, "is 0")),
        Some(value) => Ok(value),
        None => Err(front.invalid(key, "is missing")),
    }
}

/// A number that may be given once or, equal, for each layer.
fn uniform(front: &Front, key: &str) -> Result<Option<u64>, CheckpointError> {
    let value = match front.get(key) {
        Some(Stored::Array(values)) => match values.split_first() {
            Some((Stored::Integer(first), rest)) if rest.iter().all(|value| *value == Stored::Integer(*first)) => {
                u64::try_from(*first).ok()
            }
            _ => return Err(front.invalid(key, "differs from layer to layer, which LLaMA's config cannot say")),
        },
        _ => front.integer(key)?,
    };
    match value {
        Some(0) => Err(front.invalid(key, "is 0")),
        value => Ok(value),
    }
}

fn rope_scaling(
    front: &Front,
    shape: &Shape,
    theta: f64,
    rope_factors: Option<&[f32]>,
) -> Result<Value, CheckpointError> {
    if let Some(factors) = rope_factors {
        return llama3_scaling(shape, theta, factors)
            .ok_or_else(|| front.invalid("rope_freqs.weight", "fits no rotary scaling of Llama 3"));
    }
    let key = "llama.rope.scaling.type";
    let factor = front.number("llama.rope.scaling.factor")?;
    match (front.text(key)?, factor) {
        (None | Some("none"), None) => Ok(Value::Null),
        (None | Some("linear"), Some(factor)) if factor > 0.0 => Ok(json!({ "rope_type": "linear", "factor": factor })),
        (Some("none"), _) => Ok(Value::Null),
        _ => Err(front.invalid(key, "is neither none nor linear with a factor")),
    }
}

/// The parameters of Llama 3's scaling that make these factors. The file has only the factors: the largest is the scaling
/// factor, the others are those of every Llama 3.x, and the factors they give must be the file's.
fn llama3_scaling(shape: &Shape, theta: f64, factors: &[f32]) -> Option<Value> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL_LENGTH: f64 = 8192.0;
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    if factors.len() as u64 != shape.head_dim / 2 {
        return None;
    }
    for (pair, &found) in factors.iter().enumerate() {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / shape.head_dim as f64);
        let expected = if wavelength < ORIGINAL_LENGTH / HIGH {
            1.0
        } else if wavelength > ORIGINAL_LENGTH / LOW {
            factor
        } else {
            let smooth = (ORIGINAL_LENGTH / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        if (f64::from(found) - expected).abs() > 1e-4 * expected {
            return None;
        }
    }
    Some(json!({
        "factor": factor,
        "high_freq_factor": HIGH,
        "low_freq_factor": LOW,
        "original_max_position_embeddings": ORIGINAL_LENGTH as u64,
        "rope_type": "llama3",
    }))
}
