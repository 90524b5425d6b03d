#!/usr/bin/env python3
"""Perplexities of structured methods on one budget, as a table in Markdown: `make real-structured`.

Usage: structured_table.py PROGRAM TARGET_DIR [WINDOWS]. Every row is kept in TARGET_DIR/structured/rows.json as soon as it is
measured, and is not measured again; a row is a run of `espalier prune` followed by one of `espalier eval`.
"""

import json
import pathlib
import shutil
import subprocess
import sys

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
SHARES = ["0.2", "0.3", "0.5"]
METHODS = {
    "magnitude-columns": ("magnitude-columns", [], SHARES),
    "wanda-columns": ("wanda-columns", [], SHARES),
    "fasp": ("fasp", [], SHARES),
    "spap": ("spap", [], SHARES),
    "slimgpt": ("slimgpt", [], SHARES),
}
# For models of many layers: in few, the last would lose more than it has.
LOG = {"slimgpt, log": ("slimgpt", ["--allocation", "log", "--layout", "padded"], ["0.5"])}
TINY = {
    "calibration": ["--calibration", GOLDEN / "text/wikitext2-valid-head.txt", "--samples", "32", "--seq-len", "256"],
    "text": GOLDEN / "text/wikitext2-test-head.txt",
    "windows": ["--seq-len", "256", "--max-windows", "32"],
}


def models(target, windows):
    """Where each model is, what it is calibrated with, and what it is measured on."""
    real = GOLDEN / "real"
    yield "SmolLM2-135M", {
        "path": target / "real/SmolLM2-135M-Instruct.Q4_1.gguf",
        "calibration": [
            *("--calibration", real / "smollm2-calibration-32x512.jsonl", "--samples", "32", "--seq-len", "512"),
        ],
        "text": real / "wikitext2-test-head.txt",
        "windows": ["--seq-len", "2048", "--max-windows", str(windows)],
    }
    for name in ["opt-tiny", "qwen2-tiny"]:
        yield name, {"path": GOLDEN / "tiny" / name, **TINY}


class Table:
    """What was measured, on disk."""

    def __init__(self, program, folder):
        self.program, self.folder, self.path = program, folder, folder / "rows.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else {}

    def espalier(self, *arguments):
        """Runs a command; returns its JSON."""
        done = subprocess.run(
            [str(argument) for argument in (self.program, *arguments, "--json")], check=True, stdout=subprocess.PIPE
        )
        return json.loads(done.stdout)

    def measure(self, key, work):
        """The row of that name, measured unless it was before."""
        if key not in self.rows:
            self.rows[key] = work()
            self.path.write_text(json.dumps(self.rows, indent=1))
        print(key, self.rows[key], file=sys.stderr)
        return self.rows[key]

    def cell(self, key):
        """A row's perplexity as the table has it."""
        return f"{self.rows[key]['perplexity']:.2f}" if key in self.rows else "–"

    def evaluate(self, model, path):
        measured = self.espalier("eval", path, "--text", model["text"], *model["windows"], "--bench")
        return {"perplexity": measured["perplexity"], "tokens_per_second": measured["bench"]["tokens_per_second"]}

    def prune(self, model, method, share, more):
        output, run = self.folder / "out", self.folder / "run"
        for old in (output, run):
            shutil.rmtree(old, ignore_errors=True)
        report = self.espalier(
            *("prune", model["path"], "--output", output, "--run", run, "--method", method, "--sparsity", share),
            *model["calibration"],
            *more,
        )
        row = {**self.evaluate(model, output), "share": report["structured"]["share"]}
        downs = [entry["rel_error"] for entry in report["sublayers"] if "down_proj" in entry["name"] or "fc2" in entry["name"]]
        return {**row, "feed_forward_error": sum(downs) / len(downs), "seconds": report["totals"]["seconds"]}


def main():
    program, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    windows = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    table = Table(program, target / "structured")
    for name, model in models(target, windows):
        dense = table.measure(f"{name} dense", lambda: table.evaluate(model, model["path"]))
        methods = METHODS if "tiny" in name else METHODS | LOG
        for method, (spelled, more, shares) in methods.items():
            for share in shares:
                table.measure(f"{name} {method} {share}", lambda: table.prune(model, spelled, share, more))
        print(f"\n{name}, dense {dense['perplexity']:.2f}\n")
        print("| method | 20 % | 30 % | 50 % |\n|---|---|---|---|")
        for method in methods:
            cells = [table.cell(f"{name} {method} {share}") for share in SHARES]
            print(f"| {method} | {' | '.join(cells)} |")


main()
