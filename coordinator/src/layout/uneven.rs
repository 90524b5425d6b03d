//! The config of a model whose layers differ in width: `DeciLMForCausalLM` with `block_configs`.
//!
//! Source: vLLM's `models/nemotron_nas.py` and llama.cpp's converter, which read these keys; FORMATS.md C3. A layer's
//! feed-forward width is `int(2·ffn_mult·hidden/3)` rounded up to 256, and its KV heads are `num_attention_heads` over
//! `n_heads_in_group`, so that all layers have the same query heads.

use espalier_common::structure::Uneven;
use serde_json::{Value, json};

use super::LayoutError;

/// Keys that only hold for layers that are alike; loaders expect them to be null.
const ALIKE: [&str; 2] = ["intermediate_size", "num_key_value_heads"];

/// Checks the width of a layer against what loaders compute.
///
/// # Errors
/// `Multiple`, with the nearest widths that load.
pub(super) fn check(layer: usize, channels: usize, uneven: &Uneven) -> Result<(), LayoutError> {
    let multiple = uneven.multiple;
    if channels.is_multiple_of(multiple) {
        return Ok(());
    }
    let below = channels / multiple * multiple;
    let nearest = if below == 0 { multiple.to_string() } else { format!("{below} or {}", below + multiple) };
    Err(LayoutError::Multiple { layer, channels, multiple, nearest })
}

/// Turns a config of alike layers, its counts already those of the narrower model, into one of uneven layers.
///
/// # Errors
/// `Config` if it is not an object.
pub(super) fn rewrite(config: &mut Value, channels: &[usize], uneven: &Uneven) -> Result<(), LayoutError> {
    let keys = config.as_object_mut().ok_or(LayoutError::Config)?;
    let number = |key: &str| keys.get(key).and_then(Value::as_u64).filter(|&number| number > 0);
    let heads = number("num_attention_heads").unwrap_or(1);
    let group = heads / number("num_key_value_heads").unwrap_or(heads);
    let block = |&channels: &usize| {
        // What loaders make of it is the width or, by rounding, one less, which they round up to the width.
        let factor = 3.0 * channels as f64 / (2.0 * uneven.hidden as f64);
        json!({
            "attention": { "n_heads_in_group": group, "no_op": false, "replace_with_linear": false },
            "ffn": { "ffn_mult": factor, "no_op": false, "replace_with_linear": false },
        })
    };
    keys.insert("block_configs".to_owned(), channels.iter().map(block).collect());
    keys.insert("architectures".to_owned(), json!(["DeciLMForCausalLM"]));
    keys.insert("model_type".to_owned(), json!("nemotron-nas"));
    for key in ALIKE {
        keys.insert(key.to_owned(), Value::Null);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaders_compute_the_width_that_is_stored() {
        for hidden in [192, 576, 4096, 5120, 8192] {
            let uneven = Uneven { hidden, multiple: 256 };
            let channels: Vec<usize> = (1..120).map(|at| 256 * at).collect();
            let mut config = json!({ "num_attention_heads": 6, "num_key_value_heads": 2, "rope_theta": 1.0 });
            rewrite(&mut config, &channels, &uneven).unwrap();
            for (&width, told) in channels.iter().zip(config["block_configs"].as_array().unwrap()) {
                let computed = (2.0 * told["ffn"]["ffn_mult"].as_f64().unwrap() * hidden as f64 / 3.0) as usize;
                assert_eq!(computed.next_multiple_of(256), width);
                assert_eq!(told["attention"]["n_heads_in_group"], 3);
            }
            assert!(config["intermediate_size"].is_null() && config["num_key_value_heads"].is_null());
            assert_eq!(config["rope_theta"], 1.0);
        }
    }

    #[test]
    fn other_widths_are_refused_with_the_nearest() {
        let uneven = Uneven { hidden: 4096, multiple: 256 };
        assert_eq!(check(3, 512, &uneven), Ok(()));
        let nearest = |channels| match check(3, channels, &uneven) {
            Err(LayoutError::Multiple { nearest, .. }) => nearest,
            other => panic!("{other:?}"),
        };
        assert_eq!((nearest(700).as_str(), nearest(8).as_str()), ("512 or 768", "256"));
    }
}
