#!/usr/bin/env python3
"""Opens a checkpoint that Espalier wrote in stock Hugging Face transformers, and compares what it computes with ours.

    pip install torch transformers safetensors        # in an environment of its own; tests never run this
    python tests/reference/open_in_transformers.py CHECKPOINT --espalier target/release/espalier \
        --text tests/golden/text/wikitext2-test-head.txt [--seq-len 256] [--windows 8] [--logits LOGITS.safetensors]

Checks, in f32 on the CPU, and fails if one does not hold:
- every tensor of the checkpoint is used, none is missing, none has another shape;
- the perplexity of `espalier eval` on the same windows is that of transformers, within 1e-4 of it;
- with --logits: the logits in that file (`input_ids` [n] and `logits` [n, vocabulary] of one sequence, by Espalier's own
  forward pass) are those of transformers, within 1e-3 of the largest.

Prints one JSON document: keep it with the release.
"""

import argparse
import hashlib
import json
import math
import pathlib
import subprocess
import sys

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

PERPLEXITY_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 1e-3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--espalier", type=pathlib.Path, default="target/release/espalier")
    parser.add_argument("--text", type=pathlib.Path, help="evaluation text; without it, no perplexity is compared")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--logits", type=pathlib.Path, help="logits by Espalier's own forward pass")
    options = parser.parse_args()
    if not (options.text or options.logits):
        parser.error("give --text, --logits or both: opening a checkpoint proves little")
    return options


def files_of(path):
    """SHA-256 of every file that holds weights or says how they are read."""
    names = sorted(file.name for file in path.iterdir() if file.suffix in {".safetensors", ".json"})
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}


def version_of(program):
    return subprocess.run([program, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def open_checkpoint(path):
    """The model, and what is wrong with the way it loaded."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    complaints = [f"{kind}: {sorted(map(str, keys))}" for kind, keys in loading.items() if keys]
    return model.eval(), complaints


def perplexity_of_transformers(model, options):
    """One tokenisation of the whole text, windows that do not overlap, the tail dropped, no BOS in each window."""
    # The file itself: for some architectures AutoTokenizer puts a pre-tokeniser of its own in the place of the file's.
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    with open(options.text, encoding="utf-8", newline="") as file:
        tokens = torch.tensor(tokenizer.encode(file.read()).ids)
    count = min(options.windows, len(tokens) // options.seq_len)
    if count == 0:
        sys.exit(f"{options.text} holds {len(tokens)} tokens: fewer than one window of {options.seq_len}")
    losses = []
    options.windows = count
    for window in tokens[: count * options.seq_len].view(count, options.seq_len):
        logits = model(window[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(sum(losses) / count)


def perplexity_of_espalier(options):
    command = [options.espalier, "eval", options.checkpoint, "--text", options.text, "--json"]
    command += ["--seq-len", options.seq_len, "--max-windows", options.windows]
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)["perplexity"]


@torch.inference_mode()
def main():
    options = arguments()
    model, complaints = open_checkpoint(options.checkpoint)
    failures = list(complaints)
    result = {
        "checkpoint": options.checkpoint.name,
        "sha256": files_of(options.checkpoint),
        "espalier": version_of(options.espalier),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "architecture": type(model).__name__,
        "loading": complaints or "clean",
    }

    if options.logits:
        ours = load_file(options.logits)
        theirs = model(ours["input_ids"].long()[None]).logits[0]
        difference = (ours["logits"].float() - theirs).abs().max().item() / theirs.abs().max().item()
        result["logits"] = {"tokens": len(theirs), "largest_relative_difference": difference}
        if not difference <= LOGITS_TOLERANCE:
            failures.append(f"logits differ by {difference:.2e} of the largest")

    if options.text:
        # First theirs, which tells how many windows the text has.
        theirs = perplexity_of_transformers(model, options)
        ours = perplexity_of_espalier(options)
        result["perplexity"] = {"espalier": ours, "transformers": theirs}
        result["perplexity"] |= {"sequence_length": options.seq_len, "windows": options.windows}
        if not abs(ours / theirs - 1) <= PERPLEXITY_TOLERANCE:
            failures.append(f"perplexity {ours} against {theirs} in transformers")

    result["failures"] = failures
    print(json.dumps(result, indent=2))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
