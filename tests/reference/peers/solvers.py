"""Our solvers against the authors' code, on the same layer problems, the same number of threads, taking turns.

    python solvers.py --alps ALPS --sparsegpt SPARSEGPT --solve target/release/examples/solve PROBLEM... [--pattern 0.5 ...]

ALPS and SPARSEGPT are checkouts of github.com/mazumder-lab/ALPS and github.com/IST-DASLab/sparsegpt. A problem holds `weight`
and `gram`: see problems.py. A round runs every program once on a problem; what counts is the median over rounds of the ratio of
two times in the same round; `totals` adds up all problems of a layer. On a machine that is busy with other work wall times mean little: times on the processor, summed
over threads, are given beside them (ours with reading the request and writing the solution). Prints one JSON document. Needs
torch, transformers, numpy and safetensors, and Linux.
"""

import argparse
import glob
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file

import authors

# Who is timed, and against whom a ratio is taken.
OURS = [
    ("espalier fast", "espalier", {"profile": "fast"}, "alps (authors)"),
    ("espalier balanced", "espalier", {"profile": "balanced"}, "alps (authors)"),
    ("alps", "alps", {}, "alps (authors)"),
    ("sparsegpt", "sparsegpt", {}, "sparsegpt (authors)"),
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alps", type=pathlib.Path, required=True)
    parser.add_argument("--sparsegpt", type=pathlib.Path, required=True)
    parser.add_argument("--solve", type=pathlib.Path, required=True)
    parser.add_argument("--pattern", action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("problems", type=pathlib.Path, nargs="+")
    return parser.parse_args()


class Espalier:
    """The `solve` example, kept running: a start is not part of a solve."""

    def __init__(self, program, problem, threads, folder):
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        command = [str(program), str(problem)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.output = pathlib.Path(folder) / "solution.safetensors"

    def solve(self, method, params, pattern):
        request = {"method": method, "params": params, "pattern": pattern, "output": str(self.output)}
        before = processor_seconds(self.process.pid)
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the solve example ended")
        processor = processor_seconds(self.process.pid) - before
        return (json.loads(answer)["seconds"], processor), load_file(self.output)["weight"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def processor_seconds(process):
    """What all threads of a process have had of the processors."""
    total = 0
    for path in glob.glob(f"/proc/{process}/task/*/schedstat"):
        with open(path) as file:
            total += int(file.read().split()[0])
    return total / 1e9


def timed(solver, weight, gram, pattern):
    before, processor = time.perf_counter(), processor_seconds("self")
    pruned = solver.solve(weight, gram, pattern)
    return (time.perf_counter() - before, processor_seconds("self") - processor), pruned


def measure(options, path, pattern, peers):
    problem = load_file(path)
    weight, gram = problem["weight"].float(), problem["gram"].float()
    theirs = float(pattern) if ":" not in pattern else tuple(int(part) for part in pattern.split(":"))
    seconds, errors = {}, {}

    def note(name, result):
        seconds.setdefault(name, []).append(result[0])
        errors[name] = authors.relative_error(result[1], weight, gram)

    with tempfile.TemporaryDirectory() as folder:
        ours = Espalier(options.solve, path, options.threads, folder)
        # One round to warm up, not counted.
        for round_ in range(options.rounds + 1):
            if round_ == 1:
                seconds.clear()
            for name, solver in peers.items():
                note(name, timed(solver, weight, gram, theirs))
            for name, method, params, _ in OURS:
                note(name, ours.solve(method, params, pattern))
        ours.close()
    return summary(seconds, errors), seconds


def summary(seconds, errors=None):
    rows = {}
    for name, runs in seconds.items():
        wall, processor = zip(*runs)
        rows[name] = {
            "seconds": statistics.median(wall),
            "fastest": min(wall),
            "slowest": max(wall),
            "processor_seconds": statistics.median(processor),
        }
        if errors:
            rows[name]["error"] = errors[name]
    for name, _, _, peer in OURS:
        walls, processors = (
            [theirs[clock] / ours[clock] for theirs, ours in zip(seconds[peer], seconds[name])] for clock in (0, 1)
        )
        rows[name] |= {
            "times_faster": statistics.median(walls),
            "least_times_faster": min(walls),
            "times_less_processor": statistics.median(processors),
            "least_times_less_processor": min(processors),
        }
        if errors:
            rows[name]["error_against_peer"] = errors[name] / errors[peer]
    return rows


def added(rounds):
    """Rounds of several problems as rounds of all of them: seconds of the same round are added up."""
    return {
        name: [tuple(sum(clock) for clock in zip(*runs)) for runs in zip(*(seconds[name] for seconds in rounds))]
        for name in rounds[0]
    }


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    peers = {
        "alps (authors)": authors.Alps(options.alps),
        "sparsegpt (authors)": authors.SparseGpt(options.sparsegpt),
    }
    results, rounds = [], {}
    for path in options.problems:
        for pattern in options.pattern or ["0.5"]:
            rows, seconds = measure(options, path, pattern, peers)
            rounds.setdefault(pattern, []).append(seconds)
            shape = list(load_file(path)["weight"].shape)
            results.append({"problem": path.stem, "shape": shape, "pattern": pattern, "runs": rows})
            for name, row in rows.items():
                more = ""
                if "times_faster" in row:
                    more = "x{times_faster:.2f}, processor x{times_less_processor:.2f} (least {least_times_less_processor:.2f}), "
                    more = (more + "error x{error_against_peer:.4f}").format(**row)
                taken = f"{row['seconds']:8.4f} s {row['processor_seconds']:8.4f} s"
                print(f"{path.stem:10} {pattern:4} {name:20} {taken} {row['error']:.6f} {more}", file=sys.stderr, flush=True)
    totals = {pattern: summary(added(of_problems)) for pattern, of_problems in rounds.items()}
    document = {
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
        "results": results,
        "totals": totals,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
