"""All layouts of a stage on a number of accelerators, ranked by tokens per second; rejected ones with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from flm_megatron.config.rules.layout import LAYOUT_RULES
from flm_megatron.config.schema import ParallelConfig, StageConfig
from flm_megatron.planner.cost.memory import GIB, worst_memory
from flm_megatron.planner.cost.throughput import ChunkPasses, StepTime, chunk_passes, step_time
from flm_megatron.planner.layout import Workload, stage_workload
from flm_megatron.planner.machine import Machine

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
LARGEST_TENSOR = 64
LARGEST_VIRTUAL = 16
LARGEST_DATA = 512
SIMULATED = 16
"""Layouts, the best by an estimate, whose pipelines are simulated."""
MEMORY = "does not fit in memory"


@dataclass(frozen=True)
class Candidate:
    """A layout that can run."""

    work: Workload
    memory_gib: float
    step: StepTime

    @property
    def tokens_per_s_per_device(self) -> float:
        """What layouts are ranked by."""
        return self.work.step_tokens / self.step.total / self.work.world_size


@dataclass
class Rejection:
    """How many layouts fail for one reason, with the one that came nearest (memory) or came first."""

    count: int
    example: str
    nearest_gib: float = float("inf")


@dataclass
class SearchResult:
    """Layouts that fit, best first, and why the others do not."""

    candidates: list[Candidate] = field(default_factory=list)
    rejections: dict[str, Rejection] = field(default_factory=dict)

    def reject(self, reason: str, example: str, gib: float = float("inf")) -> None:
        """Count a layout under `reason`."""
        known = self.rejections.get(reason)
        if known is None:
            self.rejections[reason] = Rejection(1, example, gib)
            return
        known.count += 1
        if gib < known.nearest_gib:
            known.example, known.nearest_gib = example, gib


def search(stage: StageConfig, sequence_length: int, machine: Machine, gpus: int) -> SearchResult:
    """Try every layout of `gpus` accelerators; the vocabulary size is known.

    Layouts differ in tensor, pipeline and virtual pipeline size, micro-batch and recomputation; sequence parallelism
    goes with tensor parallelism. Everything else is the stage's. All are timed by an estimate of their pipeline, and
    the best of them by its simulation then.
    """
    result = SearchResult()
    passes: dict[tuple[int, int, int, str], ChunkPasses] = {}
    for trial in _layouts(stage, sequence_length, gpus):
        reason = _broken_rule(trial, sequence_length, gpus)
        if reason:
            result.reject(*reason)
            continue
        for recompute in RECOMPUTE:
            work = stage_workload(replace(trial, recompute=recompute), sequence_length, gpus, machine.software)
            gib = _needed_gib(work, machine)
            if gib > machine.hardware.memory_gib:
                result.reject(MEMORY, describe(work), gib)
                continue
            key = (work.parallel.tensor, work.micro_batch, work.micro_batches, recompute)
            if key not in passes:
                passes[key] = chunk_passes(work, machine)
            step = step_time(work, machine, passes[key], simulate=False)
            result.candidates.append(Candidate(work, gib, step))
    result.candidates.sort(key=lambda candidate: candidate.step.total)
    best = [replace(each, step=step_time(each.work, machine)) for each in result.candidates[:SIMULATED]]
    result.candidates[:SIMULATED] = best
    result.candidates.sort(key=lambda candidate: candidate.step.total)
    return result


def smallest_fit(stage: StageConfig, sequence_length: int, machine: Machine) -> Workload | None:
    """Layout of the fewest accelerators on which the stage fits in memory; none if no number of them is enough.

    Everything is recomputed and micro-batches hold one sample. Above one node whole nodes are counted.
    """
    for work in sorted(_lean_workloads(stage, sequence_length, machine), key=lambda work: work.world_size):
        if _needed_gib(work, machine) <= machine.hardware.memory_gib:
            return work
    return None


def leanest_gib(stage: StageConfig, sequence_length: int, machine: Machine) -> float:
    """Memory of the stage under the layout that needs least of all, on however many accelerators; infinite if the
    rules of the run file allow none."""
    needed = (_needed_gib(work, machine) for work in _lean_workloads(stage, sequence_length, machine))
    return min(needed, default=float("inf"))


def _needed_gib(work: Workload, machine: Machine) -> float:
    return worst_memory(work, machine.context_gib, machine.fragmentation).total / GIB


def describe(work: Workload) -> str:
    """A layout as text."""
    parallel = work.parallel
    virtual = f" x {parallel.virtual_pipeline} chunks" if parallel.virtual_pipeline > 1 else ""
    return (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline}{virtual} x data {work.data}, "
        f"micro-batch {work.micro_batch}, recompute {work.recompute}"
    )


def _layouts(stage: StageConfig, sequence_length: int, gpus: int) -> Iterator[StageConfig]:
    layers = max(1, stage.model.num_layers)
    for tensor in _divisors(gpus, LARGEST_TENSOR):
        for pipeline in _divisors(gpus // tensor, layers):
            for virtual in _divisors(layers, LARGEST_VIRTUAL) if pipeline > 1 else [1]:
                parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
                for micro_batch in MICRO_BATCHES:
                    yield _trial(stage, parallel, micro_batch, sequence_length)


def _trial(stage: StageConfig, parallel: ParallelConfig, micro_batch: int, sequence_length: int) -> StageConfig:
    sizes = replace(
        stage.parallel,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        data=None,
        pipeline_layers=None,
        sequence=parallel.tensor > 1 and sequence_length % parallel.tensor == 0,
    )
    return replace(stage, parallel=sizes, micro_batch=micro_batch)


def _lean_workloads(stage: StageConfig, sequence_length: int, machine: Machine) -> Iterator[Workload]:
    """Every layout of whole nodes, or of a part of one, that recomputes all and takes one sample at a time."""
    for tensor in _divisors(stage.model.query_groups, LARGEST_TENSOR):
        for pipeline in range(1, max(1, stage.model.num_layers) + 1):
            trial = _trial(stage, ParallelConfig(tensor=tensor, pipeline=pipeline), 1, sequence_length)
            for data in _divisors(stage.global_batch, LARGEST_DATA):
                world = tensor * pipeline * data
                whole = world < machine.node_size or world % machine.node_size == 0
                if whole and not _broken_rule(trial, sequence_length, world):
                    yield stage_workload(replace(trial, recompute="full"), sequence_length, world, machine.software)


def _broken_rule(stage: StageConfig, sequence_length: int, gpus: int) -> tuple[str, str] | None:
    for rule in LAYOUT_RULES:
        line = rule(stage, sequence_length, gpus)
        if line:
            summary = (rule.__doc__ or rule.__name__).splitlines()[0].rstrip(".")
            return f"breaks the rule: {summary[0].lower()}{summary[1:]}", line
    return None


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]
