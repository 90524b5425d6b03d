//! Qwen2 and Qwen2.5: LLaMA with biases on q, k and v. Source: Yang et al., arXiv 2407.10671.

use super::ModelFamily;
use super::config::Config;
use super::decoder::{PreNormDecoder, Spec, optional_windows};

/// Qwen2 and Qwen2.5.
pub(super) const FAMILY: ModelFamily = ModelFamily {
    name: "qwen2",
    architectures: &["Qwen2ForCausalLM"],
    open: |checkpoint, device| {
        let path = checkpoint.path().display().to_string();
        let config = Config::new(&path, checkpoint.config());
        let spec = Spec {
            family: "qwen2",
            qkv_bias: true,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: optional_windows(&config)?,
            widths: None,
        };
        Ok(Box::new(PreNormDecoder::open(checkpoint.clone(), device, &config, spec)?))
    },
};
