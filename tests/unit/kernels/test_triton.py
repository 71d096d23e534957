"""Every Triton kernel, run by Triton's interpreter on the CPU, against float64.

The interpreter has to be chosen before Triton is first imported, and this process may have imported it already (or
may need it compiled): the kernels run in a process of their own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.support.kernel_cases import CASES, OPERANDS, TOLERANCE, cast_errors, operand_errors, run_case

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose environment says TRITON_INTERPRET=1 from its start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        executor.submit(os.getpid).result()
    with executor:
        yield executor


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(case: str, dtype: str, interpreter: ProcessPoolExecutor) -> None:
    errors = interpreter.submit(run_case, case, "triton", "cpu", dtype).result()
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_casts_to_fp8(dtype: str, by_row: bool, transpose: bool, interpreter: ProcessPoolExecutor) -> None:
    # The interpreter's own cast loses the carry of a mantissa that is rounded up, and knows no NaN of e4m3.
    errors = interpreter.submit(cast_errors, "triton", "cpu", dtype, by_row, transpose, exact=True).result()
    assert {error for part, error in errors.items() if not part.endswith("nan")} == {0.0}, errors


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_casts_of_what_is_not_written(dtype: str, kind: str, interpreter: ProcessPoolExecutor) -> None:
    errors = interpreter.submit(operand_errors, "triton", "cpu", dtype, kind).result()
    assert errors.pop("values") < TOLERANCE[dtype]
    assert set(errors.values()) == {0.0}, errors
