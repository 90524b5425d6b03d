"""Makes tests/golden/gguf: a tiny seeded GGUF file with a tensor of every storage type, and what it must read as.

    pip install gguf numpy
    python tests/reference/gguf_golden.py

expected.json has shapes and SHA-256 digests: under `stored` of what the `gguf` package dequantises, as f32; under
`presented` of the tensors as Hugging Face has them, rounded to bf16, the interleaving of query and key rows undone. K-quants are random blocks with sane factors: the package
cannot quantise to them.
"""

import hashlib
import json
import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCABULARY = 256, 4, 2, 64, 32, 16
OUT = pathlib.Path(__file__).parents[1] / "golden" / "gguf"
rng = np.random.default_rng(20)

K_LAYOUT = {T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}  # where the f16 factors lie in a block


def random_blocks(shape, kind):
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=np.uint8)
    for at in K_LAYOUT[kind]:
        factors = rng.uniform(1e-4, 1e-2, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = factors[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def stored(shape, kind):
    if kind in K_LAYOUT:
        return random_blocks(shape, kind)
    return gguf.quants.quantize(rng.normal(0, 0.05, shape).astype(np.float32), kind)


def undo_interleaving(weight, heads):
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def merges_of(tokens, scores):
    """As transformers' converters make merges from the scores of a SentencePiece vocabulary."""
    ids, merges = {token: index for index, token in enumerate(tokens)}, []
    for token, score in zip(tokens, scores):
        cuts = [(token[:at], token[at:], score) for at in range(1, len(token))]
        cuts = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges.extend(sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]])))
    merges.sort(key=lambda cut: (cut[2], len(cut[0]), len(cut[1])), reverse=True)
    return [[left, right] for left, right, _ in merges]


layer = "model.layers.0."
tensors = {  # file name: Hugging Face name, shape, kind, heads
    "token_embd.weight": ("model.embed_tokens.weight", (VOCABULARY, HIDDEN), T.Q8_0, None),
    "output_norm.weight": ("model.norm.weight", (HIDDEN,), T.F32, None),
    "blk.0.attn_norm.weight": (layer + "input_layernorm.weight", (HIDDEN,), T.F32, None),
    "blk.0.ffn_norm.weight": (layer + "post_attention_layernorm.weight", (HIDDEN,), T.F16, None),
    "blk.0.attn_q.weight": (layer + "self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN), T.Q4_K, HEADS),
    "blk.0.attn_k.weight": (layer + "self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN), T.Q4_1, KV_HEADS),
    "blk.0.attn_v.weight": (layer + "self_attn.v_proj.weight", (KV_HEADS * HEAD, HIDDEN), T.Q5_K, None),
    "blk.0.attn_output.weight": (layer + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD), T.Q6_K, None),
    "blk.0.ffn_gate.weight": (layer + "mlp.gate_proj.weight", (FFN, HIDDEN), T.Q4_0, None),
    "blk.0.ffn_up.weight": (layer + "mlp.up_proj.weight", (FFN, HIDDEN), T.BF16, None),
    "blk.0.ffn_down.weight": (layer + "mlp.down_proj.weight", (HIDDEN, FFN), T.F16, None),
}

OUT.mkdir(parents=True, exist_ok=True)
writer = gguf.GGUFWriter(OUT / "llama.gguf", "llama")
writer.add_context_length(128)
writer.add_embedding_length(HIDDEN)
writer.add_block_count(1)
writer.add_feed_forward_length(FFN)
writer.add_head_count(HEADS)
writer.add_head_count_kv(KV_HEADS)
writer.add_rope_dimension_count(HEAD)
writer.add_layer_norm_rms_eps(1e-5)
tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "n", "▁b", "an", "ana", "▁ban", "na", "anan", "ban", "<0x0A>", "c"]
scores = [0.0, 0.0, 0.0, -9.0, -10.0, -11.0, -12.0, -2.0, -1.0, -3.0, -4.0, -1.0, -3.0, -5.0, 0.0, -13.0]
writer.add_tokenizer_model("llama")
writer.add_token_list(tokens)
writer.add_token_scores(scores)
writer.add_token_types([2, 3, 3] + [1] * 11 + [6, 1])
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_unk_token_id(0)



def digest(wide, kind):
    data = gguf.quants.quantize(wide, kind)  # F32: as it is; BF16: rounded to nearest even
    return {"shape": wide.shape, "sha256": hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()}


expected = {"stored": {}, "presented": {}}
for name, (presented, shape, kind, heads) in tensors.items():
    data = stored(shape, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    wide = gguf.quants.dequantize(data, kind).astype(np.float32).reshape(shape)
    expected["stored"][name] = digest(wide, T.F32)
    expected["presented"][presented] = digest(undo_interleaving(wide, heads) if heads else wide, T.BF16)
expected["merges"] = merges_of(tokens, scores)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
(OUT / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n")
