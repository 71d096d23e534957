"""Time of matrix multiplications and memory-bound kernels on one accelerator."""

from __future__ import annotations

import math

from flm_megatron.device.hardware import Precision
from flm_megatron.errors import RequestError
from flm_megatron.planner.machine import Machine

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
# Rows and columns of the output that one multiprocessor works on, and the speed it reaches with them.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 128, 0.7))


def peak_flops(machine: Machine, precision: Precision) -> float:
    """Dense peak in FLOP/s.

    Raises:
        RequestError: the accelerator has no units for that precision.
    """
    peak = machine.hardware.peak_tflops(precision)
    if peak is None:
        raise RequestError(f"{machine.name} has no {precision} units; plan another precision or GPU")
    return peak * 1e12


def tile_efficiency(rows: int, columns: int, batch: int, multiprocessors: int) -> float:
    """Share of the multiprocessors' time that is spent on the output's own values: the last wave of tiles leaves
    some idle, and tiles stick out over the edges. The best of the tile shapes is taken."""
    best = 0.0
    for tile_rows, tile_columns, speed in TILES:
        tiles = math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns) * batch
        waves = math.ceil(tiles / multiprocessors)
        useful = rows * columns * batch / (waves * multiprocessors * tile_rows * tile_columns)
        best = max(best, speed * useful)
    return best


def matmul_time(
    machine: Machine, precision: Precision, rows: float, columns: float, inner: float, batch: float = 1
) -> float:
    """Seconds of `batch` multiplications [rows, inner] x [inner, columns]: by the multiprocessors or by the memory."""
    rows, columns, inner, batch = (max(1, round(size)) for size in (rows, columns, inner, batch))
    efficiency = machine.efficiency.matmul * tile_efficiency(rows, columns, batch, machine.multiprocessors)
    efficiency *= inner / (inner + machine.efficiency.tile_overhead)
    compute = 2.0 * rows * columns * inner * batch / (peak_flops(machine, precision) * efficiency)
    values = batch * (rows * inner + inner * columns + rows * columns)
    return max(compute, memory_time(machine, values * BYTES[precision]))


def attention_time(machine: Machine, precision: Precision, flops: float) -> float:
    """Seconds of flash attention whose products, over the keys that causality leaves, are `flops`."""
    return flops / (peak_flops(machine, precision) * machine.efficiency.attention)


def memory_time(machine: Machine, size: float) -> float:
    """Seconds to read and write `size` bytes in all."""
    speed = machine.hardware.bandwidth_gb_per_s * 1e9 * machine.efficiency.memory
    return max(size / speed, machine.kernel_s) if size else 0.0
