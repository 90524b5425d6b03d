"""Compiles the worker's CUDA C with NVIDIA's own compiler, as the worker does at run time: types and syntax, no GPU needed.

Usage: cuda_kernels.py WHEELS SOURCE, where WHEELS is where pip installed nvidia-cuda-nvrtc. Options are those of
worker/src/device/cuda/launch.rs. Prints the kernels that came out for each architecture.
"""

import ctypes
import pathlib
import re
import sys

ARCHITECTURES = ("compute_80", "compute_90")
OPTIONS = ("--ftz=false", "--prec-sqrt=true", "--prec-div=true", "--fmad=false")


def compiled(nvrtc, source, name, architecture):
    program = ctypes.c_void_p()
    check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None))
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={architecture}")]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    if log.value.strip():
        print(log.value.decode(), file=sys.stderr)
    check(nvrtc, status)
    check(nvrtc, nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)))
    assembly = ctypes.create_string_buffer(size.value)
    check(nvrtc, nvrtc.nvrtcGetPTX(program, assembly))
    return assembly.value.decode()


def check(nvrtc, status):
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        sys.exit(f"cuda_kernels: {nvrtc.nvrtcGetErrorString(status).decode()}")


def main():
    wheels, path = map(pathlib.Path, sys.argv[1:])
    library = next(wheels.rglob("libnvrtc.so*"), None)
    builtins = next(wheels.rglob("libnvrtc-builtins.so*"), None)
    if library is None or builtins is None:
        sys.exit(f"cuda_kernels: there is no libnvrtc in {wheels}")
    # The compiler looks for it by its bare name, which it finds among what is loaded.
    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))
    source = path.read_bytes()
    declared = set(re.findall(rb'extern "C" __global__ void (\w+)', source))
    for architecture in ARCHITECTURES:
        assembly = compiled(nvrtc, source, path.name.encode(), architecture)
        kernels = re.findall(r"\.visible \.entry (\w+)\(", assembly)
        if {kernel.encode() for kernel in kernels} != declared:
            sys.exit(f"cuda_kernels: {architecture} has {sorted(kernels)}, the source declares {sorted(declared)}")
        # A product and a sum that are joined do not give the CPU's bits: nothing of ours may be.
        joined = re.findall(r"fma\.rn\.f32[^;]*;", assembly)
        print(f"{architecture}: {len(kernels)} kernels: {', '.join(sorted(kernels))}")
        if joined:
            print(f"{architecture}: {len(joined)} fused f32 operations, in the compiler's own exp and division")


if __name__ == "__main__":
    main()
