"""The authors' pruning classes, imported from checkouts that the user names, and made to run on a CPU.

ALPS (github.com/mazumder-lab/ALPS, `alps.py`) names the device `cuda:0` and single precision in its source; SparseGPT
(github.com/IST-DASLab/sparsegpt, `sparsegpt.py`) asks for a CUDA barrier. Only those words are exchanged when the source is
loaded; not a line of arithmetic is touched.
"""

import contextlib
import io
import pathlib
import sys
import types

import torch


def _load(folder, name, words):
    path = pathlib.Path(folder) / f"{name}.py"
    source = path.read_text()
    for old, new in words.items():
        source = source.replace(old, new)
    module = types.ModuleType(f"peer_{name}")
    module.__file__ = str(path)
    sys.path.insert(0, str(folder))
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    finally:
        sys.path.remove(str(folder))
    return module


_CPU = {"'cuda:0'": "'cpu'", "torch.cuda.synchronize()": "None"}
_DOUBLE = {".float()": ".double()", "torch.float)": "torch.double)"}


def _layer(weight, dtype):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    layer.weight.data = weight.to(dtype).clone()
    return layer


def _arguments(pattern):
    """A share of zeros, or the N and M of N kept of every M."""
    return (pattern, 0, 0) if isinstance(pattern, float) else (0.0, *pattern)


class Alps:
    """`solve(weight, gram, pattern)` returns the pruned weight; `dtype` is what the authors' code calls float."""

    def __init__(self, folder, dtype=torch.float32):
        words = _CPU if dtype == torch.float32 else _CPU | _DOUBLE
        self.module, self.dtype = _load(folder, "alps", words), dtype

    @torch.no_grad()
    def solve(self, weight, gram, pattern):
        share, keep, of = _arguments(pattern)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            layer = _layer(weight, self.dtype)
            solver = self.module.ALPS_prune(layer, 1, 1)
            solver.XtX = gram.to(self.dtype).clone()
            # The driver of the authors' repository passes the same penalty.
            solver.ALPS_admm(share, keep, of, rho=0.1)
        finally:
            torch.set_default_dtype(default)
        return layer.weight.data


class SparseGpt:
    """`solve(weight, gram, pattern)` returns the pruned weight, with the defaults of the authors' drivers."""

    def __init__(self, folder):
        self.module = _load(folder, "sparsegpt", _CPU)

    @torch.no_grad()
    def solve(self, weight, gram, pattern):
        share, keep, of = _arguments(pattern)
        layer = _layer(weight, torch.float32)
        solver = self.module.SparseGPT(layer)
        solver.H = gram.float().clone()
        # Theirs counts the weights to remove of every group.
        with contextlib.redirect_stdout(io.StringIO()):
            solver.fasterprune(share, prunen=of - keep, prunem=of, percdamp=0.01, blocksize=128)
        return layer.weight.data


def relative_error(pruned, weight, gram):
    """tr((V−W)G(V−W)ᵀ) / tr(WGWᵀ), in f64."""
    weight, gram = weight.double(), gram.double()
    delta = pruned.double() - weight
    return float(((delta @ gram) * delta).sum() / ((weight @ gram) * weight).sum())
