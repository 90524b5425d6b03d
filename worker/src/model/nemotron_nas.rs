//! LLaMA's kind with layers of different widths, as NVIDIA's architecture search writes it (`DeciLMForCausalLM`).
//!
//! Source: the config that vLLM's `models/nemotron_nas.py` and llama.cpp's converter read; FORMATS.md C3.
//! Deviation: layers without attention or without a feed-forward part, or with a linear map in their place, are refused.

use super::config::Config;
use super::decoder::{PreNormDecoder, Spec, Widths};
use super::{ModelError, ModelFamily};

/// Widths that follow from a factor are rounded up to this.
pub(super) const MULTIPLE: usize = 256;

/// LLaMA with `block_configs`.
pub(super) const FAMILY: ModelFamily = ModelFamily {
    name: "nemotron-nas",
    architectures: &["DeciLMForCausalLM"],
    open: |checkpoint, device| {
        let path = checkpoint.path().display().to_string();
        let config = Config::new(&path, checkpoint.config());
        let attention_bias = config.flag("attention_bias", false)?;
        let widths = widths(&config)?;
        let spec = Spec {
            family: "nemotron-nas",
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: config.flag("mlp_bias", false)?,
            qk_norm: false,
            windows: vec![None; widths.len()],
            widths: Some(widths),
        };
        Ok(Box::new(PreNormDecoder::open(checkpoint.clone(), device, &config, spec)?))
    },
};

fn widths(config: &Config<'_>) -> Result<Vec<Widths>, ModelError> {
    let (layers, heads) = (config.layers()?, config.dimension("num_attention_heads")?);
    let hidden = config.dimension("hidden_size")?;
    let blocks = config.get("block_configs").and_then(|blocks| blocks.as_array());
    let blocks = blocks.filter(|blocks| blocks.len() == layers);
    let blocks = blocks.ok_or_else(|| config.refuse("block_configs", format!("is not a list of {layers} layers")))?;
    let width = |block: &serde_json::Value| {
        let block = config.of(block);
        let part = |key: &'static str| -> Result<Config<'_>, ModelError> {
            let part = block.object(key)?.ok_or_else(|| config.refuse("block_configs", format!("{key} is missing")))?;
            for absent in ["no_op", "replace_with_linear"] {
                if part.flag(absent, false)? {
                    return Err(part.refuse(absent, format!("layers whose {key} is left out cannot be read")));
                }
            }
            Ok(part)
        };
        let (attention, ffn) = (part("attention")?, part("ffn")?);
        let group = attention.dimension("n_heads_in_group")?;
        if !heads.is_multiple_of(group) {
            let reason = format!("{group} does not divide num_attention_heads = {heads}");
            return Err(attention.refuse("n_heads_in_group", reason));
        }
        let channels = match ffn.positive_if_any("ffn_mult")? {
            // A factor that no model has would overflow; what it may be follows from the largest dimension.
            Some(factor) if factor > 1e4 => return Err(ffn.refuse("ffn_mult", format!("{factor} is no factor"))),
            Some(factor) => ((2.0 * factor * hidden as f64 / 3.0) as usize).next_multiple_of(MULTIPLE),
            None => ffn.dimension("intermediate_size")?,
        };
        Ok(Widths { kv_heads: heads / group, channels })
    };
    blocks.iter().map(width).collect()
}
