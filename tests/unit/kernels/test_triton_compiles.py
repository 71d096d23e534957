"""Every Triton kernel compiled to machine code of the GPUs it is for, which needs none of them: no register is spilled,
shared memory suffices, and enough bytes are on their way.

The interpreter takes more than the compiler does: types that change in a loop, Python values with methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.kernels.compiled import Code, compile_all, compilers, distinct, representative
from benchmarks.kernels.launches import Variant, launches
from benchmarks.kernels.machine_code import CHIPS, Report, compile_for_nvidia


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    """Processes without the interpreter, with a cache of their own."""
    with compilers() as processes:
        yield processes


def faults(executor: Executor, jobs: list[tuple[Code, str]]) -> list[str]:
    """What is wrong, a line for each code and GPU."""
    reports = compile_all(executor, jobs)
    return [
        f"{code.title()} on {chip}: {fault}"
        for (code, chip), report in zip(jobs, reports, strict=True)
        if (fault := report.fault())
    ]


def test_kernels_have_no_faults(executor: Executor) -> None:
    """The largest size for the oldest and the newest GPU and for AMD's, the middle one for the one between."""
    chosen = executor.submit(representative).result()
    largest, middle = (executor.submit(distinct, part).result() for part in (chosen[::2], chosen[1::2]))
    jobs = [(code, chip) for code in largest for chip in (*code.chips(), "gfx942") if chip != "sm_90"]
    assert faults(executor, jobs + [(code, "sm_90") for code in middle]) == []


@pytest.mark.slow
def test_kernels_have_no_faults_at_any_shape(executor: Executor) -> None:
    codes = executor.submit(distinct).result()
    assert faults(executor, [(code, chip) for code in codes for chip in (*code.chips(), "gfx942")]) == []


def test_all_kernels_are_compiled(executor: Executor) -> None:
    folder = Path(import_module("flm_megatron.kernels").__path__[0])
    written = {
        f"{path.parent.name}.{line.split('(')[0].removeprefix('def ')}"
        for path in folder.glob("*/triton_kernels.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert written == {code.kernel for code in executor.submit(distinct).result()}


def with_too_few_threads() -> Report:
    """The widest norm by so few threads that their registers cannot hold a row."""
    (launch,) = launches(Variant("norm forward", 20480, "fp32", "residual mask"))
    return compile_for_nvidia(replace(launch, options={"num_warps": 2}), CHIPS["sm_90"])


def test_spills_are_seen(executor: Executor) -> None:
    report = executor.submit(with_too_few_threads).result()
    assert report.spilled_bytes > 0
    assert "spilled" in (report.fault() or "")


def test_faults_of_a_report() -> None:
    good = Report(CHIPS["sm_80"], 64, 0, 32768, 16, 16, 32)
    assert good.resident_warps == 32
    assert good.flight == pytest.approx(32 * 32 * 32 / (2e12 * 700e-9 / 108))
    assert good.fault() is None
    assert "spilled" in (replace(good, spilled_bytes=1).fault() or "")
    assert "shared" in (replace(good, shared_bytes=164 * 1024).fault() or "")
    assert "in flight" in (replace(good, flight_bytes=4).fault() or "")
    # Shared memory or slots can hold fewer warps than registers.
    assert replace(good, shared_bytes=100 * 1024).resident_warps == 16
    assert replace(good, registers=16, warps=1, shared_bytes=0).resident_warps == 32
