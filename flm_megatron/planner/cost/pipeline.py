"""What the slowest pipeline rank waits for in a step: transfers that nothing hides, and the other ranks (bubble).

`simulated_waits` simulates the schedule; `estimated_waits` is a formula for searches, by which steps come within 2 % of
the simulated ones where pipeline ranks hold equally many layers. Where some hold more, the slowest rank waits less than
it says, for it works ahead of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.planner.cost.activations import residual_bytes
from flm_megatron.planner.cost.communication import pipeline_time, tensor_time
from flm_megatron.planner.cost.compute import Passes, Seconds
from flm_megatron.planner.cost.traffic import transfer_bytes
from flm_megatron.planner.layout import Workload
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.simulation.extrapolate import BEYOND, quick_simulation
from flm_megatron.planner.simulation.schedule import Schedule


@dataclass(frozen=True)
class ChunkPasses:
    """Passes of a layer, the head and the embedding; the same in all layouts of a world that have tensor size,
    recomputation, size and number of micro-batches in common."""

    layer: Passes
    head: Passes
    embedding: Passes


@dataclass(frozen=True)
class Waits:
    """Seconds of a step that the slowest pipeline rank waits for transfers, and for other ranks."""

    transfers: float = 0.0
    bubble: float = 0.0


def slowest_rank(work: Workload, passes: ChunkPasses) -> int:
    """The pipeline rank that works longest on a micro-batch."""
    return max(range(work.parallel.pipeline), key=lambda rank: rank_compute(work, passes, rank).total)


def rank_compute(work: Workload, passes: ChunkPasses, rank: int) -> Seconds:
    """Work of a pipeline rank on a micro-batch, in all of its chunks."""
    time = passes.layer.total * sum(work.chunks(rank))
    if rank == 0:
        time = time + passes.embedding.total
    if rank == work.parallel.pipeline - 1:
        time = time + passes.head.total
    return time


def simulated_waits(work: Workload, machine: Machine, passes: ChunkPasses) -> Waits:
    """From the schedule's passes and transfers, put together for all pipeline ranks."""
    parallel = work.parallel
    if parallel.pipeline == 1:
        return Waits()
    seconds = {
        (rank, chunk, backward): _pass_seconds(work, passes, rank, chunk, backward)
        for rank in range(parallel.pipeline)
        for chunk in range(parallel.virtual_pipeline)
        for backward in (False, True)
    }
    overlaps = work.implementation.overlaps_transfers
    schedule = Schedule(parallel.pipeline, work.micro_batches, parallel.virtual_pipeline, overlaps)
    transfer = _transfer(work, machine)
    found = quick_simulation(
        schedule,
        lambda rank, done: seconds[rank, done.chunk, done.backward],
        lambda sender, receiver: transfer,
        beyond=BEYOND if parallel.virtual_pipeline == 1 else 1,
    )
    slowest = found.ranks[slowest_rank(work, passes)]
    return Waits(slowest["pipeline"], slowest["bubble"])


def estimated_waits(work: Workload, machine: Machine, passes: ChunkPasses) -> Waits:
    """The slowest rank waits while the first and the last micro-batches pass the other ranks, which chunks shorten,
    and for its exchanges: with each neighbour once per micro-batch, with both at once after each pair of chunks'
    passes, or while the pipeline fills and empties alone where chunks' passes hide the others."""
    pipeline, chunks = work.parallel.pipeline, work.parallel.virtual_pipeline
    if pipeline == 1:
        return Waits()
    slowest, transfer = slowest_rank(work, passes), _transfer(work, machine)
    if chunks == 1:
        exchanges = work.micro_batches * (1 if slowest in (0, pipeline - 1) else 2)
    elif work.implementation.overlaps_transfers:
        exchanges = 2 * (chunks - 1) * pipeline
    else:
        exchanges = work.micro_batches * chunks
    others = sum(rank_compute(work, passes, rank).total for rank in range(pipeline) if rank != slowest)
    return Waits(exchanges * transfer, (others + (pipeline - 1) * 2 * transfer) / chunks)


def _pass_seconds(work: Workload, passes: ChunkPasses, rank: int, chunk: int, backward: bool) -> float:
    number = chunk * work.parallel.pipeline + rank
    parts = [(passes.layer, work.chunk_layers[number])]
    if number == 0:
        parts.append((passes.embedding, 1))
    if number == len(work.chunk_layers) - 1:
        parts.append((passes.head, 1))
    return sum((part.backward if backward else part.forward).total * times for part, times in parts)


def _transfer(work: Workload, machine: Machine) -> float:
    """Seconds from a pass to the next rank's that reads its output: the transfer, and the gathering of what tensor
    ranks shared."""
    seconds = pipeline_time(work, machine, transfer_bytes(work))
    if work.implementation.scatters_transfers and not work.parallel.sequence:
        seconds += tensor_time(work, machine, residual_bytes(work))
    return seconds
