"""What torch.compile makes of norms, SwiGLU and rotary positions, against float64, and what it needs."""

from __future__ import annotations

import pytest

from flm_megatron import kernels
from flm_megatron.config.schema import KernelsConfig
from flm_megatron.errors import RequestError
from flm_megatron.kernels import backends, compiled
from tests.support.kernel_cases import CASES, TOLERANCE, run_case

pytestmark = pytest.mark.usefixtures("choice_of_before")

COMPILED = [case for case in CASES if case.split(",")[0] in ("rms_norm", "add_rms_norm", "swiglu", "geglu", "rotary")]
needs_compiler = pytest.mark.skipif(compiled.compiler_obstacle() is not None, reason="there is no C++ compiler")


@needs_compiler
def test_a_compiled_kernel_agrees_with_float64() -> None:
    errors = run_case("swiglu", "compile", "cpu", "bf16")
    assert all(error < TOLERANCE["bf16"] for error in errors.values()), errors


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_kernels_agree_with_float64(case: str, dtype: str) -> None:
    errors = run_case(case, "compile", "cpu", dtype)
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        RequestError, match=r"^kernels\.swiglu: compile cannot run here: there is no C\+\+ compiler no-"
    ):
        kernels.choose(KernelsConfig(swiglu="compile"), "cpu")
    assert kernels.choose(device="cpu").names["swiglu"] == "torch"


def test_on_a_gpu_triton_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"kernels\.rotary: compile cannot run here: triton cannot be imported"):
        kernels.choose(KernelsConfig(rotary="compile"), "cuda")


def test_nothing_is_compiled_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    assert all("compile" not in kernels.choose(device=device).names.values() for device in ("cpu", "cuda"))
