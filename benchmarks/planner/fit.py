"""Find the constants of time from the rows that set them.

Of each kind of accelerator the two of matrix multiplication; of all kinds together the spread of their speeds, of which
steps of the same work on 8 to 2,048 accelerators tell.

Usage: python -m benchmarks.planner.fit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.planner.row import Row, published_seconds
from benchmarks.planner.rows import time_rows
from flm_megatron.planner.cost.throughput import step_time
from flm_megatron.planner.machine import Machine, find_machine

GPUS = ("a100", "h100")
MATMUL = [share / 100 for share in range(70, 101)]
TILE_OVERHEAD = [float(terms) for terms in range(0, 705, 64)]
SPREAD = [share / 1000 for share in range(0, 41, 5)]


def squared_error(rows: Sequence[Row], machine: Machine) -> float:
    """Sum of the squared logarithms of predicted over published seconds; pipelines are estimated, not simulated."""
    times = [step_time(row.work, machine, simulate=False).total / published_seconds(row) for row in rows]
    return sum(math.log(time) ** 2 for time in times)


def fit_products(rows: Sequence[Row], start: Machine, spread: float) -> tuple[float, float, float]:
    """Least squared error over a grid, with `matmul` and `tile_overhead` there."""

    def error(matmul: float, overhead: float) -> float:
        """Squared error with these constants."""
        efficiency = replace(start.efficiency, matmul=matmul, tile_overhead=overhead)
        return squared_error(rows, replace(start, efficiency=efficiency, spread=spread))

    return min((error(matmul, overhead), matmul, overhead) for matmul in MATMUL for overhead in TILE_OVERHEAD)


def main() -> None:
    """Print the root mean square error for each spread, and of the best the constants."""
    rows = {gpu: [row for row in time_rows() if row.gpu == gpu and row.role == "sets"] for gpu in GPUS}
    count = sum(map(len, rows.values()))
    for spread in SPREAD:
        found = {gpu: fit_products(rows[gpu], find_machine(gpu), spread) for gpu in GPUS}
        rms = math.sqrt(sum(error for error, *_ in found.values()) / count)
        constants = ", ".join(
            f"{gpu} matmul {matmul} tile_overhead {overhead:.0f}" for gpu, (_, matmul, overhead) in found.items()
        )
        print(f"spread {spread}: rms error {100 * rms:.2f} % with {constants}", flush=True)


if __name__ == "__main__":
    main()
