"""Processor time of a training step on one thread: one process, two under tensor parallelism, and `transformers`.

Beside the wall time of `flm bench`, for machines that do other work too: it leaves out waiting, for the processor and
for the other process alike.

    OMP_NUM_THREADS=1 python benchmarks/throughput/processor_time.py
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from flm_megatron.benchmarking.measure import on_ranks, state_step
from flm_megatron.benchmarking.peers.peer import transformers_step
from flm_megatron.benchmarking.steps import slowest, synthetic_batches
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import ParallelConfig, StageConfig

STEPS = 9
RUN = load_run(Path(__file__).parent / "cpu.yaml", [])
SEQUENCE = RUN.data.sequence_length


def of_programs(stage: StageConfig, peer: bool) -> list[list[float]]:
    """Least processor and wall time in s of a step of ours, and of `transformers` if it is to run too, in turn."""
    from flm_megatron import kernels

    kernels.use(kernels.choose())
    steps = [state_step(stage, SEQUENCE)[1], *([transformers_step(stage, SEQUENCE)] if peer else [])]
    batches = synthetic_batches(stage, SEQUENCE, 1)
    times: list[list[tuple[float, float]]] = [[] for _ in steps]
    for number in range(STEPS + 1):
        for step, found in zip(steps, times, strict=True):
            began = time.process_time(), time.perf_counter()
            step(batches)
            if number:  # the first warms up
                found.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return [slowest([min(one[clock] for one in found) for clock in (0, 1)]) for found in times]


def main() -> None:
    """Print a table."""
    stage = RUN.stages[0]
    ours, peer = on_ranks(ParallelConfig(), 600, of_programs, stage, True)
    rows = {"flm_megatron, one process": ours, "transformers, one process": peer}
    for sequence in (False, True):
        parallel = ParallelConfig(tensor=2, sequence=sequence)
        name = f"flm_megatron, tensor 2{' + sequence' * sequence}"
        (rows[name],) = on_ranks(parallel, 600, of_programs, replace(stage, parallel=parallel), False)
    print("| program | processor time of a step, s | wall time, s | processor time: share of the ideal |")
    print("|---|---|---|---|")
    for name, (processor, wall) in rows.items():
        share = f"{ours[0] / 2 / processor:.2f}" if "tensor" in name else f"{ours[0] / processor:.2f}"
        print(f"| {name} | {processor:.2f} | {wall:.2f} | {share} |")


if __name__ == "__main__":
    main()
