"""What implementations are written with, and whether that can run here."""

from __future__ import annotations

import os
from importlib.util import find_spec

from flm_megatron.kernels.compiled import compiler_obstacle

# The compiled parts are looked for: the package of that name on PyPI is not NVIDIA's Apex.
MODULES: dict[str, tuple[str, ...]] = {
    "te": ("transformer_engine",),
    "apex": ("apex", "amp_C", "fused_layer_norm_cuda"),
    "triton": ("triton",),
    "torch": (),
    "compile": (),
}
"""The backends by the names that a run file uses, with the modules that each needs."""
LIBRARIES = ("te", "apex")
"""Backends that are other programs' kernels, all of them for GPUs."""


def missing(backend: str, also: tuple[str, ...] = ()) -> list[str]:
    """Modules that `backend` needs, or that are named in `also`, and that are not installed."""
    return [module for module in (*MODULES[backend], *also) if find_spec(module) is None]


def obstacle(backend: str, device: str, also: tuple[str, ...] = ()) -> str | None:
    """Why an implementation in `backend` that needs the modules `also` cannot run on `device`; none if it can."""
    if absent := missing(backend, also):
        return f"{' and '.join(absent)} cannot be imported"
    if backend == "triton" and device == "cpu" and not interpreted():
        return "Triton needs a GPU (on a CPU only its interpreter runs, with TRITON_INTERPRET=1 set at the start)"
    if backend in LIBRARIES and device == "cpu":
        return "it needs a GPU"
    if backend == "compile":
        return compiler_obstacle() if device == "cpu" else obstacle("triton", device)
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
