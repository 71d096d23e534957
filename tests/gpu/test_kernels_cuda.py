"""Every kernel on a GPU, small and at the sizes of real models, against float64, and its repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flm_megatron import kernels
from flm_megatron.device import current
from tests.support.kernel_cases import (
    CASES,
    OPERANDS,
    TOLERANCE,
    cast_errors,
    draw,
    growth_mask,
    operand_errors,
    run_case,
    use,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(current().name != "cuda", reason="needs a CUDA device"),
    pytest.mark.usefixtures("choice_of_before"),
]

# The layer of the 52B model with a sequence of 2,048, and the vocabulary of 81,920.
REAL_SIZES: dict[str, dict[str, Any]] = {
    "rms_norm": {"rows": 1024, "hidden": 8192},
    "rms_norm, masked": {"rows": 512, "hidden": 20480},
    "add_rms_norm": {"rows": 2048, "hidden": 8192},
    "swiglu": {"rows": 512, "ffn": 21824},
    "rotary, one query a group": {"sequence": 2048, "batch": 1, "groups": 64, "queries": 1, "channels": 128},
    "rotary, grouped queries": {"sequence": 2048, "batch": 2, "groups": 8, "queries": 8, "channels": 128},
    "cross_entropy, padded": {"rows": 256, "width": 81920, "vocab_size": 80000},
    "linear_cross_entropy": {
        "rows": 1024,
        "channels": 2048,
        "width": 81920,
        "vocab_size": 80000,
        "chunk_tokens": 512,
    },
    "adamw": {"sizes": (1 << 26, 8192, 3)},
    "clip": {"sizes": (1 << 26, 8192, 3), "max_norm": 1.0},
}


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(case: str, dtype: str, name: str) -> None:
    errors = run_case(case, name, "cuda", dtype)
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_casts_to_fp8_round_to_the_nearest(by_row: bool, transpose: bool, name: str) -> None:
    errors = cast_errors(name, "cuda", "bf16", by_row, transpose)
    assert all(error <= 0.5 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("kind", OPERANDS)
def test_casts_of_what_is_not_written(kind: str, name: str) -> None:
    errors = operand_errors(name, "cuda", "bf16", kind)
    assert errors.pop("values") < TOLERANCE["bf16"]
    assert set(errors.values()) == {0.0}, errors


@pytest.mark.parametrize("case", REAL_SIZES)
def test_kernels_agree_with_float64_at_real_sizes(case: str) -> None:
    errors = run_case(case, "triton", "cuda", "bf16", **REAL_SIZES[case])
    assert all(error < TOLERANCE["bf16"] for error in errors.values()), errors


def test_repeats_are_equal_to_the_bit() -> None:
    use("triton", "cuda")
    x = draw(1000, 2048, dtype="bf16", device="cuda", seed=1).requires_grad_()
    weight = draw(2048, dtype="bf16", device="cuda", seed=2).requires_grad_()
    results: list[tuple[torch.Tensor, ...]] = []
    for _ in range(3):
        x.grad = weight.grad = None
        kernels.rms_norm(x, weight, 1e-5, growth_mask(2048, "cuda")).square().sum().backward()
        assert x.grad is not None and weight.grad is not None
        results.append((x.grad, weight.grad, kernels.grad_norm([x.grad, weight.grad])))
    for repeat in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(repeat, results[0], strict=True))
