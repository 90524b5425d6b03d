//! Mistral: LLaMA with a sliding window. Source: Jiang et al., arXiv 2310.06825.

use super::ModelFamily;
use super::config::Config;
use super::decoder::{PreNormDecoder, Spec};

/// Mistral.
pub(super) const FAMILY: ModelFamily = ModelFamily {
    name: "mistral",
    architectures: &["MistralForCausalLM"],
    open: |checkpoint, device| {
        let path = checkpoint.path().display().to_string();
        let values = checkpoint.config();
        let config = Config::new(&path, values);
        // Absent is not null: the reference implementation takes 4096 where the key is missing.
        let window = if values.get("sliding_window").is_none() {
            Some(4096)
        } else {
            config.dimension_if_any("sliding_window")?
        };
        let spec = Spec {
            family: "mistral",
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![window; config.layers()?],
            widths: None,
        };
        Ok(Box::new(PreNormDecoder::open(checkpoint.clone(), device, &config, spec)?))
    },
};
