//! GGUF tensor names to Hugging Face's, for the llama architecture.

/// What becomes of a tensor.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It is presented under this name.
    Weight(String),
    /// As `Weight`, but llama.cpp has interleaved the two halves of each query head's rows for its rotary embedding.
    Query(String),
    /// As `Query`, for key heads.
    Key(String),
    /// Rotary frequency factors: part of the config.
    RopeFactors,
}

/// Finds the role of a tensor; nothing if a LLaMA model has no such tensor.
pub(super) fn role(name: &str) -> Option<Role> {
    let plain = |name: &str| Some(Role::Weight(name.to_owned()));
    match name {
        "token_embd.weight" => return plain("model.embed_tokens.weight"),
        "output_norm.weight" => return plain("model.norm.weight"),
        "output.weight" => return plain("lm_head.weight"),
        "rope_freqs.weight" => return Some(Role::RopeFactors),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, suffix) = rest.rsplit_once('.')?;
    if !matches!(suffix, "weight" | "bias") {
        return None;
    }
    let module = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    let name = format!("model.layers.{layer}.{module}.{suffix}");
    Some(match part {
        "attn_q" => Role::Query(name),
        "attn_k" => Role::Key(name),
        _ => Role::Weight(name),
    })
}

/// The row in the file that is row `row` of the Hugging Face tensor: a head's first half is at its even rows, the second
/// half at its odd ones.
pub(super) fn interleaved_row(row: usize, head_rows: usize) -> usize {
    let (head, within) = (row / head_rows, row % head_rows);
    let half = head_rows / 2;
    head * head_rows + within % half * 2 + within / half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_layer_has_its_name() {
        let name = |name: &str| Role::Weight(name.to_owned());
        assert_eq!(role("blk.12.ffn_down.weight"), Some(name("model.layers.12.mlp.down_proj.weight")));
        assert_eq!(role("blk.0.attn_k.bias"), Some(Role::Key("model.layers.0.self_attn.k_proj.bias".to_owned())));
        for foreign in ["blk.x.attn_q.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q.scale", "v.patch.weight", ""]
        {
            assert_eq!(role(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn interleaving_is_a_permutation_within_heads() {
        assert_eq!((0..8).map(|row| interleaved_row(row, 4)).collect::<Vec<_>>(), [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
