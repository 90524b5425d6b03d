#!/usr/bin/env bash
# Builds espalier-worker-cuda with what kit.sh gets. No GPU and no driver are needed to build; where it runs, the driver's libcuda
# and the libraries of the kit must be found by the loader.
# Usage: build.sh TARGET CARGO. Half an hour or more the first time, nearly all of it in the tensor library's kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1
cargo=$2
# shellcheck source=deploy/cuda/kit.sh
. deploy/cuda/kit.sh

"$cargo" build --release -p espalier-worker --bin espalier-worker --features cuda,nccl --target-dir "$kit/target"
mkdir -p "$target/release"
cp "$kit/target/release/espalier-worker" "$target/release/espalier-worker-cuda"
echo "$target/release/espalier-worker-cuda needs on its LD_LIBRARY_PATH: $home/lib"

# What it can use here. Without a driver it uses the CPU, and says in one line why it cannot have a GPU.
"$target/release/espalier-worker-cuda" devices
has_driver && exit 0
code=0
"$target/release/espalier-worker-cuda" serve --coordinator http://127.0.0.1:1 --device cuda:0 || code=$?
[ "$code" -eq 65 ] || { echo "cuda:0 was not refused: exit code $code" >&2; exit 1; }
