"""Time of a training step."""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.planner.cost.buckets import gradient_bytes, weight_bytes
from flm_megatron.planner.cost.communication import data_time, pipeline_time
from flm_megatron.planner.cost.compute import Passes, Seconds, embedding_passes, head_passes, layer_passes
from flm_megatron.planner.cost.matmul import memory_time
from flm_megatron.planner.cost.traffic import transfer_bytes
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


@dataclass(frozen=True)
class ChunkPasses:
    """Passes of a layer, the head and the embedding; the same in all layouts that differ in data or pipeline only."""

    layer: Passes
    head: Passes
    embedding: Passes


def chunk_passes(work: Workload, machine: Machine) -> ChunkPasses:
    """Passes of a layer, the head and the embedding."""
    return ChunkPasses(layer_passes(work, machine), head_passes(work, machine), embedding_passes(work, machine))


def step_time(work: Workload, machine: Machine, passes: ChunkPasses | None = None) -> StepTime:
    """Time of a step.

    The slowest pipeline rank works through all micro-batches; it waits besides while the first and the last ones
    pass the other ranks, which interleaving shortens by the number of chunks.
    """
    passes = passes or chunk_passes(work, machine)
    pipeline = work.parallel.pipeline
    ranks = [_rank_compute(work, passes, rank) for rank in range(pipeline)]
    slowest = max(ranks, key=lambda rank: rank.total)
    transfer = _transfer(work, machine, passes)
    others = sum(rank.total + transfer for rank in ranks) - slowest.total - transfer
    return StepTime(
        compute=slowest * work.micro_batches,
        pipeline=transfer * work.micro_batches,
        bubble=others / work.parallel.virtual_pipeline,
        data=_data(work, machine, passes),
        optimizer=_optimizer(work, machine),
    )


def tflops_per_device(work: Workload, seconds: float) -> float:
    """Model TFLOP/s of each device (causal attention counted half, no recomputation)."""
    flops = training_flops_per_token(work.model, work.sequence_length) * work.step_tokens
    return flops / seconds / work.world_size / 1e12


def _rank_compute(work: Workload, passes: ChunkPasses, rank: int) -> Seconds:
    time = passes.layer.total * sum(work.chunks(rank))
    if rank == 0:
        time = time + passes.embedding.total
    if rank == work.parallel.pipeline - 1:
        time = time + passes.head.total
    return time


def _transfer(work: Workload, machine: Machine, passes: ChunkPasses) -> float:
    """Waiting for neighbours per micro-batch: 1F1B exchanges after each pass; the interleaved schedule's transfers
    run beside the next chunk's pass, and cost their start and what that does not hide."""
    if work.parallel.pipeline == 1:
        return 0.0
    transfer = pipeline_time(work, machine, transfer_bytes(work))
    chunks = work.parallel.virtual_pipeline
    if chunks == 1:
        return 2 * transfer
    layers = min(work.chunk_layers)
    times = (passes.layer.forward.total * layers, passes.layer.backward.total * layers)
    return chunks * sum(machine.latency_s + max(0.0, transfer - hidden) for hidden in times)


def _data(work: Workload, machine: Machine, passes: ChunkPasses) -> float:
    """Reduction of fp32 gradients and gathering of new weights, less what one micro-batch's passes hide."""
    ranks = range(work.parallel.pipeline)
    reduce = data_time(work, machine, max(gradient_bytes(work, rank) for rank in ranks))
    if not work.parallel.distributed_optimizer:
        return 2 * reduce
    gather = data_time(work, machine, max(weight_bytes(work, rank) for rank in ranks))
    layers = max(sum(work.chunks(rank)) for rank in (0, work.parallel.pipeline - 1))
    if work.parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - layers * passes.layer.backward.total)
    if work.parallel.overlap_param_gather:
        gather = max(0.0, gather - layers * passes.layer.forward.total)
    return reduce + gather


def _optimizer(work: Workload, machine: Machine) -> float:
    """Clear and scale the gradients (12 bytes each), then norm and update of this rank's shard: read gradient, master
    and moments, write the latter and the weight."""
    parameters = max(work.rank_parameters(rank, trained=True) for rank in (0, work.parallel.pipeline - 1))
    shards = work.data if work.parallel.distributed_optimizer else 1
    return memory_time(machine, parameters * (12 + (32 + work.bytes) / shards))
