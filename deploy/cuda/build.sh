#!/usr/bin/env bash
# Builds espalier-worker-cuda with the parts of CUDA that PyPI has: its compiler, headers and libraries, and NCCL. No GPU and no
# driver are needed to build; where it runs, the driver's libcuda and the libraries beside it must be found by the loader.
# Usage: build.sh TARGET CARGO. Downloads 1 GB, once; half an hour or more, nearly all of it in the tensor library's kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1
cargo=$2
mkdir -p "$target/cuda-kit"
kit=$(cd "$target/cuda-kit" && pwd)

# Gets some packages into a folder of the kit, whole or not at all, unless they are there.
fetch() {
    local folder=$kit/$1
    shift
    [ ! -d "$folder" ] || return 0
    rm -rf "$kit/partial"
    python3 -m pip install --quiet --root-user-action=ignore --no-deps --target "$kit/partial" "$@"
    mv "$kit/partial" "$folder"
}
fetch wheels nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88 nvidia-curand==10.4.0.35 nvidia-cublas==13.1.0.3 \
    nvidia-cusolver==12.4.1.2 nvidia-cusparse==12.9.4.2
fetch nccl nvidia-nccl-cu13==2.32.3
home=$kit/wheels/nvidia/cu13
[ -e "$home/lib64" ] || ln -s lib "$home/lib64"
# One folder for the linker and the loader, whatever the package calls its own.
nccl=$(find "$kit/nccl" -name 'libnccl.so.*' -print -quit)
[ -n "$nccl" ] || { echo "the package of NCCL has no libnccl.so" >&2; exit 1; }
ln -sf "$nccl" "$home/lib/$(basename "$nccl")"
# The linker wants names without versions.
for library in "$home/lib"/*.so.*; do
    plain=${library%%.so.*}.so
    [ -e "$plain" ] || ln -s "$(basename "$library")" "$plain"
done
# The driver's library comes with the driver: what is linked against answers that there is none.
mkdir -p "$home/lib/stubs"
if [ ! -e "$home/lib/stubs/libcuda.so" ]; then
    {
        grep -ohE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+|_ptsz|_ptds)?\(' "$home/include/cuda.h" | tr -d '('
        grep -oE '^ *# *define +cu[A-Z][A-Za-z0-9]* +[A-Za-z_(]*cu[A-Z][A-Za-z0-9_]*' "$home/include/cuda.h" \
            | grep -oE 'cu[A-Z][A-Za-z0-9_]*$'
    } | sort -u | sed 's/.*/int &(void) { return 34; } \/\/ CUDA_ERROR_STUB_LIBRARY/' > "$kit/libcuda.c"
    cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$home/lib/stubs/libcuda.so" "$kit/libcuda.c"
    ln -sf libcuda.so "$home/lib/stubs/libcuda.so.1"
fi

export CUDA_HOME="$home" CUDA_PATH="$home" CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}" PATH="$home/bin:$PATH"
export LIBRARY_PATH="$home/lib:$home/lib/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}"
"$cargo" build --release -p espalier-worker --bin espalier-worker --features cuda,nccl --target-dir "$target/cuda-kit/target"
mkdir -p "$target/release"
cp "$kit/target/release/espalier-worker" "$target/release/espalier-worker-cuda"
echo "$target/release/espalier-worker-cuda needs on its LD_LIBRARY_PATH: $home/lib"

# Without a driver it uses the CPU, and says in one line why it cannot have a GPU.
export LD_LIBRARY_PATH="$home/lib:$home/lib/stubs"
"$target/release/espalier-worker-cuda" devices
code=0
"$target/release/espalier-worker-cuda" serve --coordinator http://127.0.0.1:1 --device cuda:0 || code=$?
[ "$code" -eq 65 ] || echo "cuda:0 was not refused: exit code $code" >&2
