//! LLaMA. Source: Touvron et al., arXiv 2302.13971 and 2307.09288; Grattafiori et al., arXiv 2407.21783.

use super::ModelFamily;
use super::config::Config;
use super::decoder::{PreNormDecoder, Spec};

/// LLaMA 1 to 3 and the models that keep its architecture (SmolLM2, …).
pub(super) const FAMILY: ModelFamily = ModelFamily {
    name: "llama",
    architectures: &["LlamaForCausalLM"],
    open: |checkpoint, device| {
        let path = checkpoint.path().display().to_string();
        let config = Config::new(&path, checkpoint.config());
        let attention_bias = config.flag("attention_bias", false)?;
        let spec = Spec {
            family: "llama",
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: config.flag("mlp_bias", false)?,
            qk_norm: false,
            windows: vec![None; config.layers()?],
            widths: None,
        };
        Ok(Box::new(PreNormDecoder::open(checkpoint.clone(), device, &config, spec)?))
    },
};
