"""Writes tests/golden/families/<name>/: small random decoders, and the logits that transformers computes for them.

Run by hand from the repository root, with torch, transformers, safetensors and numpy installed:

    python tests/reference/families.py

Each directory has config.json, model.safetensors (f32) and golden.safetensors (`tokens` [n] i32, `logits` [n, vocabulary] f32).
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config

OUT = pathlib.Path(__file__).parent.parent / "golden" / "families"
TOKENS = 40

LLAMA_LIKE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
)
OPT = dict(
    vocab_size=64,
    hidden_size=32,
    ffn_dim=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=48,
    word_embed_proj_dim=32,
    pad_token_id=1,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

CASES = {
    "llama-mha": LlamaConfig(**LLAMA_LIKE),
    "llama-gqa-tied": LlamaConfig(**LLAMA_LIKE | dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-biases": LlamaConfig(**LLAMA_LIKE, attention_bias=True, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**LLAMA_LIKE | dict(num_key_value_heads=1), head_dim=12),
    "llama-rope-llama3": LlamaConfig(**LLAMA_LIKE, rope_parameters=LLAMA3),
    "llama-rope-linear": LlamaConfig(
        **LLAMA_LIKE, rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=4.0)
    ),
    "llama-rope-dynamic": LlamaConfig(
        **LLAMA_LIKE | dict(max_position_embeddings=16),
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
    ),
    "mistral-window": MistralConfig(**LLAMA_LIKE | dict(num_key_value_heads=2), sliding_window=7),
    "qwen2": Qwen2Config(**LLAMA_LIKE | dict(num_key_value_heads=2)),
    "qwen2-window": Qwen2Config(
        **LLAMA_LIKE | dict(num_key_value_heads=2), use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**LLAMA_LIKE | dict(num_key_value_heads=2), head_dim=16, tie_word_embeddings=True),
    "opt": OPTConfig(**OPT),
    "opt-projected-post-norm": OPTConfig(**OPT | dict(word_embed_proj_dim=20), do_layer_norm_before=False),
    "opt-no-bias": OPTConfig(**OPT, enable_bias=False, layer_norm_elementwise_affine=False),
    "opt-gelu-untied": OPTConfig(
        **OPT, activation_function="gelu", tie_word_embeddings=False, _remove_final_layer_norm=True
    ),
}


def randomise(model, generator):
    """Weights large enough that attention is peaked and every switch moves the logits."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1.0 + 0.3 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.3 * noise
        elif "embed" in name:
            parameter.data = noise
        else:
            parameter.data = 1.5 * noise / parameter.shape[1] ** 0.5


def older_spelling(config):
    """The same config as transformers 4 wrote it: rope_theta at the top, rope_scaling beside it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return config


def write(name, config, seed):
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomise(model, generator)
    tokens = torch.randint(config.vocab_size, (TOKENS,), generator=generator)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, folder / "golden.safetensors")
    written = json.loads((folder / "config.json").read_text())
    if name in ("llama-rope-linear", "llama-gqa-tied"):
        written = older_spelling(written)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    print(f"{name}: logits up to {logits.abs().max():.3f}")


for seed, (name, config) in enumerate(CASES.items()):
    write(name, config, seed)
