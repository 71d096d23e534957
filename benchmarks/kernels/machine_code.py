"""A Triton kernel compiled for a GPU that is not there: what the compiler says of registers, spills and shared memory,
and an estimate of whether the kernel can use the memory's bandwidth.

The estimate is Little's law: to move B bytes a second that each take L seconds to come, B x L bytes have to be on
their way. A multiprocessor has on its way what one thread has (`in_flight.py`) times the threads that its registers,
shared memory and slots hold at a time. Latency under load is 600 to 800 ns by microbenchmarks of these GPUs; 700 ns
stands here. About half of what most of the kernels move they write, and writes need nothing on its way, so that half
of B x L does for them.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernels.in_flight import bytes_in_flight, widest_load
from benchmarks.kernels.launches import Launch

LATENCY_S = 700e-9
REGISTERS = 65536
"""Registers of a multiprocessor, of 32 bits; a warp takes them in units of 256."""
WARPS = 64
BLOCKS = 32
RESERVED_SHARED = 1024
"""Bytes of shared memory that the driver takes of each block."""


@dataclass(frozen=True)
class Chip:
    """An NVIDIA GPU: compute capability, memory bandwidth from its data sheet, multiprocessors, and the shared memory
    that one block may have, which is 1 KiB less than a multiprocessor has."""

    capability: int
    bandwidth_tb_s: float
    processors: int
    shared_kib: int

    def needed_bytes(self) -> float:
        """Bytes that each multiprocessor has to have on their way for the whole bandwidth."""
        return self.bandwidth_tb_s * 1e12 * LATENCY_S / self.processors


CHIPS = {
    "sm_80": Chip(80, 2.0, 108, 163),  # A100 80 GB
    "sm_90": Chip(90, 3.35, 132, 227),  # H100 SXM
    "sm_100": Chip(100, 8.0, 148, 227),  # B200
}


@dataclass(frozen=True)
class Report:
    """What the compiler says of a kernel: per thread, but `shared_bytes` of a block of `warps` warps.

    `load_bytes` is the widest load of a thread, `flight_bytes` the estimate of `in_flight.py`.
    """

    chip: Chip
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    load_bytes: int
    flight_bytes: int

    @cached_property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor holds at a time."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 256) // self.warps
        by_shared = (self.chip.shared_kib + 1) * 1024 // (self.shared_bytes + RESERVED_SHARED)
        return min(by_registers, by_shared, WARPS // self.warps, BLOCKS) * self.warps

    @property
    def flight(self) -> float:
        """Bytes on their way on a multiprocessor, over those that the whole bandwidth needs."""
        return self.flight_bytes * self.resident_warps * 32 / self.chip.needed_bytes()

    def fault(self) -> str | None:
        """What is wrong with the kernel on this GPU: spilled registers, too much shared memory, too few loads."""
        if self.spilled_bytes:
            return f"{self.spilled_bytes} bytes of registers spilled"
        if self.shared_bytes > self.chip.shared_kib * 1024:
            return f"{self.shared_bytes} bytes of shared memory, the chip has {self.chip.shared_kib} KiB"
        if self.flight < 0.5:
            return f"{self.flight:.2f} of the bytes in flight that the bandwidth needs"
        return None


def compile_for_nvidia(launch: Launch, chip: Chip) -> Report:
    """Compile `launch` to machine code of `chip`, with the newest assembler that Triton brings for all of them.

    Raises:
        AssertionError: the assembler's report could not be read.
    """
    nvidia = triton.knobs.nvidia
    nvidia.ptxas = nvidia.ptxas_blackwell.path
    nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with redirect_stdout(io.StringIO()) as log:
        built = triton.compile(_source(launch), target=GPUTarget("cuda", chip.capability, 32), options=launch.options)
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert registers and spilled, text
    assembly = _assembly(built.asm["cubin"])
    return Report(
        chip,
        int(registers[1]),
        max(int(spilled[1]), int(spilled[2])),
        built.metadata.shared,
        built.metadata.num_warps,
        widest_load(assembly),
        bytes_in_flight(assembly),
    )


def compile_for_amd(launch: Launch) -> tuple[int, int, int]:
    """Compile `launch` to machine code of an MI300 (gfx942): vector registers, spilled ones, bytes of shared memory.

    Needs nothing of ROCm. A warp has 64 threads there, so that blocks of the same size have half as many; the kernels'
    own launches do the same under ROCm.
    """
    options = {**launch.options, "num_warps": max(launch.options.get("num_warps", 4) // 2, 1)}
    built = triton.compile(_source(launch), target=GPUTarget("hip", "gfx942", 64), options=options)
    assembly = built.asm["amdgcn"]
    registers, spilled = (re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count"))
    assert registers and spilled, launch.name
    return int(registers[1]), int(spilled[1]), built.metadata.shared


def _source(launch: Launch) -> ASTSource:
    return ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)


def _assembly(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
