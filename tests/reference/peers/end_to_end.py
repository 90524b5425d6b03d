"""SparseGPT from a checkpoint to a checkpoint: llm-compressor against Espalier, taking turns.

    python end_to_end.py --espalier target/release/espalier --model CHECKPOINT --calibration TOKENS.jsonl --text TEXT

CHECKPOINT is in the Hugging Face format; TOKENS holds one `{"input_ids": [...]}` a line, all of the same length. Each prunes to
50 % on the same sequences and writes a checkpoint, which is then evaluated by `espalier eval`. llm-compressor computes in the
type that its model was loaded as, so it takes part twice: in the checkpoint's own type, and in float32 as Espalier always does.
Wall time is that of the whole command; memory is the resident memory of all its processes together, looked at five times a
second. Prints one JSON document with all and the ratios to Espalier. Needs torch, transformers, llmcompressor and psutil.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

SPARSITY = 0.5
PEERS = {"llm-compressor": "auto", "llm-compressor, float32": "float32"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--espalier", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--compress-to", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def sequences(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["input_ids"] for line in file]


def compress(options):
    """What a user of llm-compressor writes; runs in a process of its own."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    tokens = sequences(options.calibration)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=SparseGPTModifier(sparsity=SPARSITY, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"]),
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(options.compress_to)
    # Saving a model leaves its tokenizer behind.
    for file in options.model.glob("tokenizer*.json"):
        shutil.copy(file, options.compress_to)


def resident(process):
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total


def run(command, log):
    """Seconds and the most bytes that were resident at a time."""
    started = time.perf_counter()
    with open(log, "wb") as sink:
        child = subprocess.Popen([str(part) for part in command], stdout=sink, stderr=subprocess.STDOUT)
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        try:
            peak = max(peak, resident(process))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    if child.returncode:
        sys.exit(f"{command[0]} failed:\n{pathlib.Path(log).read_text(errors='replace')[-3000:]}")
    return time.perf_counter() - started, peak


def perplexity(options, checkpoint):
    command = [options.espalier, "eval", checkpoint, "--text", options.text, "--seq-len", 2048]
    command += ["--max-windows", options.windows, "--json"]
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)["perplexity"]


def main():
    options = arguments()
    if options.compress_to:
        return compress(options)
    tokens = sequences(options.calibration)
    shared = ["--model", options.model, "--calibration", options.calibration, "--text", options.text]
    shared += ["--espalier", options.espalier, "--threads", options.threads]
    seconds, peaks, perplexities = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(options.rounds):
            out = {name: pathlib.Path(folder) / f"{name}-{round_}" for name in [*PEERS, "espalier"]}
            commands = {
                name: [sys.executable, __file__, *shared, "--dtype", dtype, "--compress-to", out[name]]
                for name, dtype in PEERS.items()
            }
            commands["espalier"] = [
                *[options.espalier, "prune", options.model, "--output", out["espalier"], "--method", "sparsegpt"],
                *["--sparsity", SPARSITY, "--workers", 1, "--calibration", options.calibration],
                *["--samples", len(tokens), "--seq-len", len(tokens[0]), "--threads", options.threads],
            ]
            for name, command in commands.items():
                taken, peak = run(command, pathlib.Path(folder) / "log")
                seconds.setdefault(name, []).append(taken)
                peaks.setdefault(name, []).append(peak)
                print(f"{name}: {taken:.1f} s, {peak / 2**20:.0f} MiB", file=sys.stderr, flush=True)
                perplexities[name] = perplexity(options, out[name])
    result = {
        name: {
            "seconds": seconds[name],
            "peak_bytes": peaks[name],
            "perplexity": perplexities[name],
        }
        for name in seconds
    }
    for name in PEERS:
        for key, figures in (("times_faster", seconds), ("times_less_memory", peaks)):
            ratios = [theirs / ours for theirs, ours in zip(figures[name], figures["espalier"])]
            result[name][key] = statistics.median(ratios)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
