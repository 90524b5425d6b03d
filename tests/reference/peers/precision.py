"""How well ALPS is determined: the authors' code in f32, in f32 on the same problem times 1.1, and in f64.

    python precision.py --alps ALPS tests/golden/problems/smollm2_layer2_v_proj.safetensors GOLDEN_F64.safetensors

Multiplying all weights by 1.1 changes rounding and nothing else. Prints the error of each run and the share of the weights
kept by a run that the others keep too; writes the supports of the f64 runs, one bit a weight, least significant first, which
a test follows step by step. Needs torch, transformers, numpy and safetensors.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import load_file, save_file

import authors

PATTERNS = {"50": 0.5, "70": 0.7, "2of4": (2, 4)}


def packed(support):
    bits = support.reshape(-1).to(torch.int64)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (bits << torch.arange(8)).sum(1).to(torch.uint8)


def unpacked(bytes_, shape):
    bits = (bytes_.to(torch.int64)[:, None] >> torch.arange(8)) & 1
    return bits.reshape(-1)[: shape.numel()].reshape(shape).bool()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alps", type=pathlib.Path, required=True)
    parser.add_argument("problem", type=pathlib.Path)
    parser.add_argument("golden", type=pathlib.Path)
    options = parser.parse_args()
    problem = load_file(options.problem)
    weight, gram = problem["weight"].float(), problem["gram"].float()
    narrow, wide = authors.Alps(options.alps), authors.Alps(options.alps, torch.float64)
    results, golden = {}, {}
    for case, pattern in PATTERNS.items():
        runs = {
            "f32": narrow.solve(weight, gram, pattern),
            "f32 of 1.1 times the weights": narrow.solve(weight * 1.1, gram, pattern) / 1.1,
            "f64": wide.solve(weight, gram, pattern),
        }
        supports = {name: pruned != 0 for name, pruned in runs.items()}
        supports["golden"] = unpacked(problem[f"alps_{case}.support"], weight.shape)

        def overlap(one, other):
            return float((supports[one] & supports[other]).sum() / supports[other].sum())

        results[case] = {
            "error": {name: authors.relative_error(pruned, weight, gram) for name, pruned in runs.items()},
            "overlap with f32": {name: overlap(name, "f32") for name in supports},
            "overlap with f64": {name: overlap(name, "f64") for name in supports},
        }
        golden[f"alps_{case}.support"] = packed(supports["f64"])
        golden[f"alps_{case}.error"] = torch.tensor([results[case]["error"]["f64"]], dtype=torch.float64)
    save_file(golden, options.golden)
    print(json.dumps({"problem": options.problem.stem, "torch": torch.__version__, "results": results}, indent=2))


if __name__ == "__main__":
    main()
