//! Qwen3: LLaMA with q and k normalised head by head. Source: Yang et al., arXiv 2505.09388.

use super::ModelFamily;
use super::config::Config;
use super::decoder::{PreNormDecoder, Spec, optional_windows};

/// Qwen3 (dense).
pub(super) const FAMILY: ModelFamily = ModelFamily {
    name: "qwen3",
    architectures: &["Qwen3ForCausalLM"],
    open: |checkpoint, device| {
        let path = checkpoint.path().display().to_string();
        let values = checkpoint.config();
        let config = Config::new(&path, values);
        if config.get("head_dim").is_none() {
            return Err(config.refuse("head_dim", "is missing, and does not follow from hidden_size here"));
        }
        let attention_bias = config.flag("attention_bias", false)?;
        let spec = Spec {
            family: "qwen3",
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: false,
            qk_norm: true,
            windows: optional_windows(&config)?,
            widths: None,
        };
        Ok(Box::new(PreNormDecoder::open(checkpoint.clone(), device, &config, spec)?))
    },
};
