"""Every Triton kernel compiled for GPUs that are not there, at the shapes that the kernels are for: registers,
spills, shared memory, occupancy, bytes in flight.

    python -m benchmarks.kernels.compiled

Prints a Markdown table, `compiled.md`; status 1 if a kernel has a fault (`Report.fault`). Launches that are compiled to
the same code share a line. Takes some six minutes of one core, on as many as there are.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

from benchmarks.kernels.launches import Variant, launches, variants
from benchmarks.kernels.machine_code import CHIPS, Report, compile_for_amd, compile_for_nvidia

WITHOUT_FP8 = ("sm_80",)


class Code(NamedTuple):
    """One kernel, compiled: its name, the variants that launch it so, and which launch of the first of them it is."""

    kernel: str
    variants: list[Variant]
    launch: int

    def chips(self) -> list[str]:
        """The GPUs that it is for: FP8 came with compute capability 8.9."""
        return [chip for chip in CHIPS if not self.variants[0].operation.startswith("fp8") or chip not in WITHOUT_FP8]

    def title(self) -> str:
        """One line that names it."""
        first = self.variants[0]
        return f"{self.kernel} {first.size} {first.dtype} {first.options}".strip()


class AMDReport(NamedTuple):
    """What the compiler says of a kernel on an MI300: vector registers, spilled ones, bytes of shared memory."""

    registers: int
    spilled: int
    shared_bytes: int

    def fault(self) -> str | None:
        """What is wrong with it."""
        if self.spilled:
            return f"{self.spilled} vector registers spilled"
        return f"{self.shared_bytes} bytes of shared memory, the chip has 64 KiB" if self.shared_bytes > 65536 else None


@contextmanager
def compilers(processes: int | None = None) -> Iterator[Executor]:
    """Processes that compile Triton kernels (one for each processor by default), with a cache that is then deleted."""
    with tempfile.TemporaryDirectory() as folder:
        before = {name: os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TRITON_INTERPRET")}
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ.pop("TRITON_INTERPRET", None)
        try:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0)), context) as executor:
                yield executor
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def distinct(chosen: Iterable[Variant] | None = None) -> list[Code]:
    """What there is to compile for the variants `chosen`, all by default. Triton must not be its interpreter."""
    found: dict[str, Code] = {}
    for variant in variants() if chosen is None else chosen:
        for number, launch in enumerate(launches(variant)):
            found.setdefault(launch.key, Code(launch.name, [], number)).variants.append(variant)
    return list(found.values())


def compiled(variant: Variant, number: int, chip: str) -> Report | AMDReport:
    """Launch `number` of `variant` compiled for one of `CHIPS`, or for `gfx942`."""
    launch = launches(variant)[number]
    if chip != "gfx942":
        return compile_for_nvidia(launch, CHIPS[chip])
    return AMDReport(*compile_for_amd(launch))


def compile_all(executor: Executor, jobs: list[tuple[Code, str]]) -> list[Report | AMDReport]:
    """Reports of the codes on the GPUs that stand beside them, in order."""
    return list(
        executor.map(
            compiled,
            [code.variants[0] for code, _ in jobs],
            [code.launch for code, _ in jobs],
            [chip for _, chip in jobs],
        )
    )


def representative() -> list[Variant]:
    """Of each operation the largest size with all options and the middle one with none, in bf16."""
    chosen = []
    for operation in dict.fromkeys(variant.operation for variant in variants()):
        mine = [variant for variant in variants() if variant.operation == operation and variant.dtype == "bf16"]
        sizes = sorted({variant.size for variant in mine})
        chosen.append(max((v for v in mine if v.size == sizes[-1]), key=lambda v: len(v.options)))
        chosen.append(min((v for v in mine if v.size == sizes[len(sizes) // 2]), key=lambda v: len(v.options)))
    return chosen


def _line(code: Code, reports: dict[str, Report | AMDReport]) -> str:
    first = code.variants[0]
    sizes = ", ".join(f"{size:,}" for size in dict.fromkeys(variant.size for variant in code.variants))
    options = ", ".join(dict.fromkeys(variant.options for variant in code.variants if variant.options)) or "-"
    cells = []
    for chip in CHIPS:
        report = reports.get(chip)
        if isinstance(report, Report):
            numbers = (report.registers, report.warps, report.resident_warps, report.load_bytes)
            cells.append(" · ".join(map(str, numbers)) + f" · {report.flight:.1f}")
        else:
            cells.append("-")
    amd = reports["gfx942"]
    shared = max(report.shared_bytes for report in reports.values()) / 1024
    spilled = max(r.spilled_bytes if isinstance(r, Report) else 4 * r.spilled for r in reports.values())
    cells += [str(amd.registers), f"{shared:.1f}", str(spilled)]
    return f"| {code.kernel} | {sizes} | {first.dtype} | {options} | {' | '.join(cells)} |"


def main() -> int:
    """Print the table and what is wrong."""
    with compilers() as executor:
        codes = executor.submit(distinct).result()
        jobs = [(code, chip) for code in codes for chip in (*code.chips(), "gfx942")]
        reports = compile_all(executor, jobs)
    print(f"Triton {version('triton')}; {len(codes)} kernels, {len(jobs)} times compiled.\n")
    print(f"| kernel | size | dtype | with | {' | '.join(CHIPS)} | gfx942 | shared, KiB | spilled, bytes |")
    print("|---" * (len(CHIPS) + 7) + "|")
    faults = []
    for code in codes:
        mine = {chip: report for (other, chip), report in zip(jobs, reports, strict=True) if other is code}
        print(_line(code, mine))
        faults += [f"{code.title()} on {chip}: {fault}" for chip, report in mine.items() if (fault := report.fault())]
    print("\n".join(["", *faults]) if faults else "\nNo kernel has a fault.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
