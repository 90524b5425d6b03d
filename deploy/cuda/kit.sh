# The parts of CUDA that PyPI has: its compiler, headers and libraries, and NCCL. Sourced, with the build folder in $target; gets
# what is not there yet, once, and sets what builds against it and what runs need. Downloads 1 GB.
# shellcheck shell=bash
: "${target:?the build folder}"
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
# A folder is fetched once: what is added gets one of its own, or the folder another name.
fetch wheels nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88 nvidia-curand==10.4.0.35 nvidia-cublas==13.1.0.3 \
    nvidia-cusolver==12.4.1.2 nvidia-cusparse==12.9.4.2
fetch jitlink nvidia-nvjitlink==13.0.88
fetch nccl nvidia-nccl-cu13==2.32.3
home=$kit/wheels/nvidia/cu13
[ -e "$home/lib64" ] || ln -s lib "$home/lib64"
# One folder for the linker and the loader, whatever the packages call their own.
for folder in nccl jitlink; do
    library=$(find "$kit/$folder" -name 'lib*.so.*' -print -quit)
    [ -n "$library" ] || { echo "the package in $kit/$folder has no library" >&2; exit 1; }
    ln -sf "$library" "$home/lib/$(basename "$library")"
done
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
# Where there is a driver, its own library counts.
export LD_LIBRARY_PATH="$home/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
has_driver() {
    local libraries
    libraries=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p) && [[ $libraries == *libcuda.so.1* ]]
}
has_driver || export LD_LIBRARY_PATH="$LD_LIBRARY_PATH:$home/lib/stubs"
