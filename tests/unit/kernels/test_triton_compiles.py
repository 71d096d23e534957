"""Every Triton kernel compiles to machine code of the GPUs it is for, which needs no GPU.

The interpreter takes more than the compiler does: types that change in a loop, Python values with methods.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

POINTERS = {
    "labels_ptr": "*i64",
    "address_ptr": "*i64",
    "span_ptr": "*i64",
    "fp8_ptr": "*fp8e4nv",
    **dict.fromkeys(("mask_ptr", "inverse_rms_ptr", "partial_ptr", "cos_ptr", "sin_ptr", "found_ptr"), "*fp32"),
    **dict.fromkeys(("log_sum_ptr", "scale_ptr", "factor_ptr", "param_like", "moment_like"), "*fp32"),
}
FLOATS = ("eps", "scale", "decay", "beta1", "beta2", "step_size", "root_correction", "limit")
CONSTANTS = {"BLOCK": 1024, "BLOCKS": 2, "HEAD": 1024, "TAIL": 512, "HEADS": 32, "HALF": 64, "SIDE": 64}
KERNELS = [
    ("norm", "_forward_kernel"),
    ("norm", "_backward_kernel"),
    ("norm", "_two_pass_backward_kernel"),
    ("glu", "_forward_kernel"),
    ("glu", "_backward_kernel"),
    ("rotary", "_rotate_kernel"),
    ("rotary", "_pack_kernel"),
    ("loss", "_statistics_kernel"),
    ("loss", "_gradient_kernel"),
    ("adam", "_adamw_kernel"),
    ("clip", "_squares_kernel"),
    ("clip", "_scale_kernel"),
    ("fp8", "_cast_kernel"),
]
WITH_OPTIONS = ("norm", "glu", "adam", "fp8")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process without the interpreter, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        executor.submit(int).result()
    with executor:
        yield executor


def machine_code_size(operation: str, name: str, flags: bool) -> int:
    """Bytes of the kernel's code for an H100 (sm_90), with bf16 operands and all optional ones or none."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel: Any = getattr(import_module(f"flm_megatron.kernels.{operation}.triton_kernels"), name)
    constants = {n: CONSTANTS.get(n, flags) for n in kernel.arg_names if n.isupper()}
    signature = {n: _type_of(n) for n in kernel.arg_names}
    built = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    return len(built.asm["cubin"])


def _type_of(name: str) -> str:
    if name.isupper():
        return "constexpr"
    if name.endswith(("_ptr", "like")):
        return POINTERS.get(name, "*bf16")
    return "fp32" if name in FLOATS else "i32"


OPTIONS = [(*kernel, flags) for kernel in KERNELS for flags in (True, False) if flags or kernel[0] in WITH_OPTIONS]


@pytest.mark.parametrize(("operation", "name", "flags"), OPTIONS)
def test_kernels_compile(operation: str, name: str, flags: bool, compiler: ProcessPoolExecutor) -> None:
    assert compiler.submit(machine_code_size, operation, name, flags).result() > 0


def test_all_kernels_are_listed() -> None:
    folder = Path(import_module("flm_megatron.kernels").__path__[0])
    written = {
        (path.parent.name, line.split("(")[0].removeprefix("def "))
        for path in folder.glob("*/triton_kernels.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert written == set(KERNELS)
