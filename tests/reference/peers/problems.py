"""Makes layer problems of a real model: the weights of one decoder layer and the grams of their inputs in the dense model.

    python problems.py CHECKPOINT CALIBRATION.jsonl OUT --layer 2 --sequences 16

CHECKPOINT is in the Hugging Face format, CALIBRATION holds one `{"input_ids": [...]}` a line. OUT gets one safetensors file a
problem, with `weight [out, in]` and `gram [in, in]`, the mean over tokens. Needs torch, transformers, safetensors.
"""

import argparse
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file

SUBLAYERS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("calibration", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    return parser.parse_args()


@torch.inference_mode()
def main():
    options = arguments()
    with open(options.calibration, encoding="utf-8") as file:
        sequences = [json.loads(line)["input_ids"] for line in file][: options.sequences]
    model = transformers.AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    layer = model.model.layers[options.layer]
    grams, tokens = {}, 0

    def capture(name):
        def hook(_, inputs):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            grams[name] = grams.get(name, 0) + rows.T @ rows

        return hook

    for name, path in SUBLAYERS.items():
        layer.get_submodule(path).register_forward_pre_hook(capture(name))
    for sequence in sequences:
        model.model(torch.tensor([sequence]))
        tokens += len(sequence)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, path in SUBLAYERS.items():
        weight = layer.get_submodule(path).weight.detach().float().contiguous()
        save_file({"weight": weight, "gram": (grams[name] / tokens).float()}, options.out / f"{name}.safetensors")
        print(f"{name} {list(weight.shape)}, {tokens} tokens")


if __name__ == "__main__":
    main()
