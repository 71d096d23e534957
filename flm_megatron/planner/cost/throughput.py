"""Time of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import NormalDist

from flm_megatron.planner.cost.buckets import gradient_bytes, weight_bytes
from flm_megatron.planner.cost.communication import data_time, pipeline_time
from flm_megatron.planner.cost.compute import Passes, Seconds, embedding_passes, head_passes, layer_passes
from flm_megatron.planner.cost.matmul import memory_time
from flm_megatron.planner.cost.pipeline import (
    ChunkPasses,
    estimated_waits,
    rank_compute,
    simulated_waits,
    slowest_rank,
)
from flm_megatron.planner.layout import Workload
from flm_megatron.planner.machine import Machine
from flm_megatron.training.metrics.flops import training_flops_per_token


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline rank, by what they are spent on.

    `pipeline` is waiting for transfers, `bubble` waiting for other pipeline ranks, `data` the communication over
    data ranks that nothing hides, `optimizer` gradient norm, scaling and update.
    """

    compute: Seconds
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.compute.total + self.pipeline + self.bubble + self.data + self.optimizer


def chunk_passes(work: Workload, machine: Machine) -> ChunkPasses:
    """Passes of a layer, the head and the embedding, on the slowest of all ranks."""
    factor = slowest_of(machine, work.world_size)
    parts = layer_passes(work, machine), head_passes(work, machine), embedding_passes(work, machine)
    return ChunkPasses(*(Passes(_slowed(part.forward, factor), _slowed(part.backward, factor)) for part in parts))


def slowest_of(machine: Machine, ranks: int) -> float:
    """How much longer than the average accelerator the slowest of `ranks` takes.

    Expected largest of as many normal numbers (Blom, 1958): ranks wait for each other in every step, and pipeline
    ranks for every micro-batch.
    """
    return 1 + machine.spread * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 1.0


def step_time(work: Workload, machine: Machine, passes: ChunkPasses | None = None, simulate: bool = True) -> StepTime:
    """Time of a step: what the slowest pipeline rank works in all micro-batches, and what it waits for.

    Without `simulate` waiting is estimated by a formula, for searches (`estimated_waits`).
    """
    passes = passes or chunk_passes(work, machine)
    waits = (simulated_waits if simulate else estimated_waits)(work, machine, passes)
    return StepTime(
        compute=rank_compute(work, passes, slowest_rank(work, passes)) * work.micro_batches,
        pipeline=waits.transfers,
        bubble=waits.bubble,
        data=_data(work, machine, passes) + _tied_embedding(work, machine),
        optimizer=_optimizer(work, machine),
    )


def tflops_per_device(work: Workload, seconds: float) -> float:
    """Model TFLOP/s of each device (causal attention counted half, no recomputation)."""
    flops = training_flops_per_token(work.model, work.sequence_length) * work.step_tokens
    return flops / seconds / work.world_size / 1e12


def _slowed(seconds: Seconds, factor: float) -> Seconds:
    """What a slower accelerator takes; links are as fast as before."""
    return replace(seconds * factor, tensor=seconds.tensor)


def _data(work: Workload, machine: Machine, passes: ChunkPasses) -> float:
    """Reduction of gradients and gathering of new weights, less what passes hide."""
    ranks = range(work.parallel.pipeline)
    scatters = 1 if work.parallel.distributed_optimizer else 2
    reduces = [scatters * data_time(work, machine, gradient_bytes(work, rank)) for rank in ranks]
    gathers = [data_time(work, machine, weight_bytes(work, rank)) for rank in ranks] if scatters == 1 else [0.0]
    if work.parallel.virtual_pipeline == 1:
        return _reduction(work, passes, reduces) + _gathering(work, passes, gathers)
    reduce, gather = max(reduces), max(gathers)
    layers = max(sum(work.chunks(rank)) for rank in (0, work.parallel.pipeline - 1))
    if work.parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - layers * passes.layer.backward.total)
    if work.parallel.overlap_param_gather:
        gather = max(0.0, gather - layers * passes.layer.forward.total)
    return reduce + gather


def _reduction(work: Workload, passes: ChunkPasses, seconds: Sequence[float]) -> float:
    """Of gradients under 1F1B. Overlapped, that of the first rank runs beside its last backward pass; any other rank's
    begins after its own, when those before it still have theirs to do."""
    if not work.parallel.overlap_grad_reduce:
        return max(seconds)
    backward = [layers * passes.layer.backward.total for layers in work.chunk_layers]
    others = (reduce - passed for reduce, passed in zip(seconds[1:], accumulate(backward), strict=False))
    return max(seconds[0] - backward[0], *others, 0.0)


def _gathering(work: Workload, passes: ChunkPasses, seconds: Sequence[float]) -> float:
    """Of weights under 1F1B. Overlapped, that of the first rank runs beside its first forward pass; any other rank
    gathers all of its weights, which are one bucket, when this asks for them, and those behind it wait."""
    if not work.parallel.overlap_param_gather:
        return max(seconds)
    first, *others = seconds
    return max(0.0, first - work.chunk_layers[0] * passes.layer.forward.total) + sum(others)


def _tied_embedding(work: Workload, machine: Machine) -> float:
    """The first and the last pipeline rank add up the gradients of an embedding that is the head too."""
    if not work.copied_embedding:
        return 0.0
    return pipeline_time(work, machine, work.implementation.gradient_bytes * work.embedding_parameters)


def _optimizer(work: Workload, machine: Machine) -> float:
    """Clear and scale the gradients (12 bytes each), then norm and update of this rank's shard: read gradient, master
    and moments, write the latter and the weight; fp16's loss scale is taken out of the gradient first, in fp32."""
    parameters = max(work.rank_parameters(rank, trained=True) for rank in (0, work.parallel.pipeline - 1))
    shards = work.data if work.parallel.distributed_optimizer else 1
    unscaled = 8 if work.precision == "fp16" else 0
    return memory_time(machine, parameters * (12 + (32 + unscaled + work.bytes) / shards))
