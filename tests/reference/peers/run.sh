#!/usr/bin/env bash
# Espalier against others on SmolLM2-135M, taking turns on this machine: `make bench-peers [ALPS=DIR] [SPARSEGPT=DIR]`.
# Usage: run.sh TARGET_DIR [ALPS_DIR SPARSEGPT_DIR]
#
# Needs PyPI for the model and for a virtual environment under TARGET_DIR/peers (several gigabytes: torch, transformers,
# llm-compressor). The authors' solvers are not on PyPI: with checkouts of github.com/mazumder-lab/ALPS and
# github.com/IST-DASLab/sparsegpt they take part too. Prints one JSON document of whole runs and, before it, with the checkouts,
# one of solvers; what is already there is kept.
set -euo pipefail

readonly target="${1:?usage: run.sh TARGET_DIR [ALPS_DIR SPARSEGPT_DIR]}" alps="${2:-}" sparsegpt="${3:-}"
here=$(dirname "$0")
readonly here folder="$target/peers" golden="$here/../../golden"
if [[ -n "$alps" && -z "$sparsegpt" || -z "$alps" && -n "$sparsegpt" ]]; then
    echo "run.sh: only one of ALPS and SPARSEGPT is given; the solvers are compared with both or with none" >&2
    exit 2
fi
readonly python="$folder/venv/bin/python" calibration="$golden/real/smollm2-calibration-32x512.jsonl"

"$here/../real.sh" "$target"
mkdir -p "$folder"
if ! "$python" -c 'import llmcompressor, psutil' 2>/dev/null; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet llmcompressor==0.14.0.1 psutil numpy safetensors
fi

# The dense model as the others read it: a method that removes nothing, written as safetensors.
if [[ ! -d "$folder/dense" ]]; then
    "$target/release/espalier" prune "$target/real/SmolLM2-135M-Instruct.Q4_1.gguf" --output "$folder/dense" \
        --run "$folder/dense.run" --method magnitude --sparsity 0 --workers 1 \
        --calibration "$golden/text/wikitext2-valid-head.txt" --samples 1 --seq-len 64 >&2
fi

export PYTHONDONTWRITEBYTECODE=1
if [[ -n "$alps" && -n "$sparsegpt" ]]; then
    # A folder of an earlier version may lack some of a layer's problems.
    if [[ ! -f "$folder/problems/gate_proj.safetensors" ]]; then
        rm -rf "$folder/problems" "$folder/problems.partial"
        "$python" "$here/problems.py" "$folder/dense" "$calibration" "$folder/problems.partial" >&2
        mv "$folder/problems.partial" "$folder/problems"
    fi
    "$python" "$here/solvers.py" --alps "$alps" --sparsegpt "$sparsegpt" --solve "$target/release/examples/solve" \
        "$folder"/problems/*.safetensors
else
    echo "run.sh: no checkouts of ALPS and SparseGPT are given: solvers are not compared" >&2
fi
"$python" "$here/end_to_end.py" --espalier "$target/release/espalier" --model "$folder/dense" \
    --calibration "$calibration" --text "$golden/real/wikitext2-test-head.txt"
