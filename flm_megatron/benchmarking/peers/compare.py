"""The same model in several programs on one process, one step of each in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flm_megatron import kernels
from flm_megatron.benchmarking.measure import PROGRAM, describe_measurement, planned_gib, state_step
from flm_megatron.benchmarking.peers.bare_megatron import bare_megatron_step
from flm_megatron.benchmarking.peers.peer import BARE, transformers_step
from flm_megatron.benchmarking.peers.torchtitan import torchtitan_step
from flm_megatron.benchmarking.result import Measurement
from flm_megatron.benchmarking.steps import Step, held_gib, synthetic_batches, timed
from flm_megatron.benchmarking.workload import Request
from flm_megatron.config.schema import StageConfig
from flm_megatron.device import current
from flm_megatron.training.step import Batch

BUILDERS: dict[str, Callable[[StageConfig, int], Step]] = {
    BARE: bare_megatron_step,
    "transformers": transformers_step,
    "transformers-compiled": partial(transformers_step, compiled=True),
    "torchtitan": torchtitan_step,
    PROGRAM: lambda stage, sequence: state_step(stage, sequence)[1],
}


@dataclass
class _Contestant:
    """A program's step, what its weights and optimizer hold, its times and the memory of a step."""

    step: Step
    resident_gib: float
    times: list[float]
    memory_gib: float = 0.0


def measure_side_by_side(request: Request, peers: Sequence[str]) -> list[dict[str, object]]:
    """Measure our step and those of `peers` in a world of one process; `Measurement`s as plain data, ours first.

    All programs are there together, and take one step each on the same tokens in turn, so that a change of the
    machine's speed meets all of them. A program's memory is what its own model added, and its step on top.
    """
    kernels.use(kernels.choose(request.kernels))
    stage, sequence = request.stage, request.sequence_length
    batches = synthetic_batches(stage, sequence, 1)
    contestants = {}
    for name, build in BUILDERS.items():
        if name == PROGRAM or name in peers:
            before = held_gib()
            step = build(stage, sequence)
            for _ in range(max(1, request.warmup)):
                step(batches)
            contestants[name] = _Contestant(step, held_gib() - before, [])
    for _ in range(request.steps):
        for contestant in contestants.values():
            contestant.times.append(timed(contestant.step, batches))
    for contestant in contestants.values():
        _weigh(contestant, batches)
    return [vars(_measurement(name, contestants[name], request)) for name in (PROGRAM, *peers)]


def _weigh(contestant: _Contestant, batches: list[Batch]) -> None:
    """Take the memory of one more step: to look at it makes a step slower."""
    before = held_gib()
    contestant.step(batches)
    contestant.memory_gib = contestant.resident_gib + current().peak_memory_gib() - before


def _measurement(name: str, contestant: _Contestant, request: Request) -> Measurement:
    times, memory_gib = contestant.times, contestant.memory_gib
    found = describe_measurement(name, request.stage, request.sequence_length, 1, times, memory_gib)
    if name != PROGRAM:
        return found
    return Measurement(**{**vars(found), "planned_gib": planned_gib(request, 1)})


def ratios(measurements: Sequence[Measurement]) -> dict[str, float]:
    """How many times as long a step of each peer takes as ours, the first: the median over pairs of steps taken one
    after the other."""
    ours, *peers = measurements
    return {
        peer.program: statistics.median(
            theirs / mine for theirs, mine in zip(peer.step_times_s, ours.step_times_s, strict=True)
        )
        for peer in peers
    }
