"""The same ten steps under every layout of 1, 2, 4 and 8 processes: largest relative difference from one process.

    OMP_NUM_THREADS=1 python -m benchmarks.training.layouts

Batches and layouts are those of `tests/distributed/training/test_layouts.py`, the model is its deep one. Prints a
Markdown table.
"""

from __future__ import annotations

from flm_megatron.config.schema import ParallelConfig
from tests.support.layouts import DEEP, all_layouts, relative_difference, train_under
from tests.support.pool import Pool

COLUMNS = "| tensor | sequence | pipeline | virtual | data | loss | gradient norm |"


def main() -> None:
    """Train under every layout and print how far each is from one process."""
    pool = Pool()
    single = pool.run(1, train_under, ParallelConfig(), DEEP)[0]
    print(f"{COLUMNS}\n|---|---|---|---|---|---|---|")
    worst = 0.0
    for parallel in (layout for world in (2, 4, 8) for layout in all_layouts(world)):
        steps = pool.run(parallel.processes, train_under, parallel, DEEP)[0]
        loss, norm = (
            relative_difference([step[i : i + 1] for step in steps], [step[i : i + 1] for step in single])
            for i in (0, 1)
        )
        worst = max(worst, loss, norm)
        sequence = "yes" if parallel.sequence else ""
        sizes = (
            f"| {parallel.tensor} | {sequence} | {parallel.pipeline} | {parallel.virtual_pipeline} | {parallel.data} "
        )
        print(f"{sizes}| {loss:.1e} | {norm:.1e} |", flush=True)
    print(f"\nLargest of all: {worst:.1e}")


if __name__ == "__main__":
    main()
