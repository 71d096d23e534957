"""Find the two constants of matrix multiplication of a kind of accelerator from the rows that set them.

Usage: python -m benchmarks.planner.fit a100
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

from benchmarks.planner.rows import Row, published_seconds, time_rows
from flm_megatron.planner.cost.throughput import step_time
from flm_megatron.planner.machine import find_machine


def log_error(row: Row, matmul: float, tile_overhead: float) -> float:
    """Logarithm of predicted over published seconds."""
    machine = find_machine(row.gpu)
    efficiency = replace(machine.efficiency, matmul=matmul, tile_overhead=tile_overhead)
    return math.log(step_time(row.work, replace(machine, efficiency=efficiency)).total / published_seconds(row))


def fit(gpu: str) -> tuple[float, float, float]:
    """Root mean square error, matmul and tile_overhead of the best point of a grid."""
    rows = [row for row in time_rows() if row.gpu == gpu and row.role == "sets"]
    grid = [(matmul / 100, overhead) for matmul in range(60, 96) for overhead in range(0, 640, 32)]
    return min((math.sqrt(sum(log_error(row, *point) ** 2 for row in rows) / len(rows)), *point) for point in grid)


if __name__ == "__main__":
    error, matmul, tile_overhead = fit(sys.argv[1])
    print(f"{sys.argv[1]}: matmul {matmul}, tile_overhead {tile_overhead}, rms error {100 * error:.1f} %")
