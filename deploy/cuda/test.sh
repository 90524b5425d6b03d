#!/usr/bin/env bash
# Runs the worker's tests in its CUDA build, and jobs on a GPU beside the same on the CPU. Without a GPU what needs one is skipped,
# out loud.
# Usage: test.sh TARGET CARGO, after build.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1
cargo=$2
# shellcheck source=deploy/cuda/kit.sh
. deploy/cuda/kit.sh

# One GPU for all of them: a test at a time.
# Two ranks of NCCL may share it.
NCCL_MULTI_RANK_GPU_ENABLE=1 "$cargo" test --release -p espalier-worker --lib --features cuda,nccl --target-dir "$kit/target" -- --nocapture --test-threads 1
"$cargo" test --release -p espalier-tests --test suite -- --ignored --nocapture --test-threads 1 gpu::
