"""Memory of each pipeline rank at its peak."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from flm_megatron.device.chunks import FP8_SLAB_VALUES, SHARED_READ_BYTES
from flm_megatron.planner.cost.activations import (
    feed_forward_values,
    fuses_head,
    head_activations,
    layer_activations,
    logits,
    residual_bytes,
    stream_bytes,
)
from flm_megatron.planner.cost.buckets import rank_buckets
from flm_megatron.planner.layout import Workload

GIB = 2**30


@dataclass(frozen=True)
class RankMemory:
    """Bytes on every tensor and data rank of one pipeline rank.

    `activations` is what waits for its backward pass, `working` what one pass (gradients of activations and weights,
    logits, recomputed activations) or building the model needs besides, `buffers` what communication holds,
    `allowance` the driver's share and fragmentation.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    buffers: float
    allowance: float

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(vars(self).values())


def rank_memory(work: Workload, rank: int, context_gib: float = 0.0, fragmentation: float = 0.0) -> RankMemory:
    """Peak memory of pipeline rank `rank`.

    Gradients are fp32; Adam has two fp32 moments, and an fp32 master beside bf16 weights, split over data ranks by
    the distributed optimizer; weights that adapters leave as they are have neither. `fragmentation` is a share of
    activations and working memory.
    """
    trained = work.rank_parameters(rank, trained=True)
    shards = work.data if work.parallel.distributed_optimizer else 1
    optimizer = trained * (8 if work.precision == "fp32" else 12) / shards
    activations, working = _dynamic(work, rank)
    copies = work.implementation.copies_gradients_to_reduce and work.data > 1
    if copies and work.parallel.distributed_optimizer:
        # The copy lives when no activation does.
        working = max(working, 4.0 * trained - activations)
    weights, buffers = work.bytes * work.rank_parameters(rank), _buffers(work)
    working = max(working, _before_steps(work, rank, trained, optimizer) - activations - buffers)
    return RankMemory(
        weights=weights,
        gradients=4 * trained,
        optimizer=optimizer,
        activations=activations,
        working=working,
        buffers=buffers,
        allowance=context_gib * GIB + fragmentation * (activations + working),
    )


def _before_steps(work: Workload, rank: int, trained: int, optimizer: float) -> float:
    """What building or loading the model needs on top of weights, gradients and `optimizer`; no activation is there,
    and while it is built no optimizer."""
    loading = _loading(work, rank) if work.data > 1 else 0.0
    if not work.parallel.distributed_optimizer:
        return loading
    return max(loading, _building(work, rank, trained) - optimizer)


def _loading(work: Workload, rank: int) -> float:
    """What replicas hold that one of them reads for all, region by region: of a tensor in several regions what was
    read, what is received and the one before. New weights in bf16 are rounded from fp32; without the distributed
    optimizer two states of the largest tensor follow each other."""
    sharded, region = work.parallel.distributed_optimizer, float(SHARED_READ_BYTES)
    largest = (work.bytes if sharded else 4) * max(chain.from_iterable(_shards_on(work, rank)))
    if not sharded:
        return min(2.0 * largest, largest + region, 3 * region)
    return min(largest, 3 * region) if work.precision == "fp32" else 3 * min(largest, region)


def _building(work: Workload, rank: int, trained: int) -> float:
    """While a chunk is built, its weights that learn lie there beside the buffer of the data-parallel group that they
    go into; the gradients of later chunks are not there yet."""
    if work.parallel.virtual_pipeline == 1:
        return float(work.bytes * trained)
    chunks = [sum(buckets) for buckets in rank_buckets(work, rank)]
    return float(max(work.bytes * values - 4 * sum(chunks[index + 1 :]) for index, values in enumerate(chunks)))


def _shards_on(work: Workload, rank: int) -> list[list[int]]:
    """Values of each kind of parameter that learns on a pipeline rank."""
    shards, last = work.trained_shards, work.parallel.pipeline - 1
    return [shards["layers"], shards["first"] * (rank == 0), shards["last"] * (rank == last)]


def worst_memory(work: Workload, context_gib: float = 0.0, fragmentation: float = 0.0) -> RankMemory:
    """Memory of the pipeline rank that needs most: the first (activations, embedding) or the last (head) where layers
    are split evenly."""
    pipeline = work.parallel.pipeline
    ranks = range(pipeline) if work.parallel.pipeline_layers else {0, pipeline - 1}
    memories = [rank_memory(work, rank, context_gib, fragmentation) for rank in ranks]
    return max(memories, key=lambda memory: memory.total)


def all_rank_memory(work: Workload, context_gib: float = 0.0, fragmentation: float = 0.0) -> list[RankMemory]:
    """Peak memory of every pipeline rank."""
    return [rank_memory(work, rank, context_gib, fragmentation) for rank in range(work.parallel.pipeline)]


def chunk_activations(work: Workload, rank: int) -> list[float]:
    """Bytes that one micro-batch keeps in each model chunk of a rank, without the head's."""
    layer = layer_activations(work).kept
    sent = 0.0 if work.implementation.frees_pipeline_outputs else residual_bytes(work)
    kept = [layers * layer + sent for layers in work.chunks(rank)]
    if rank == work.parallel.pipeline - 1:
        kept[-1] -= sent  # the last chunk's output is the head's input
    return kept


def _dynamic(work: Workload, rank: int) -> tuple[float, float]:
    """Activations in flight, and the most that any moment needs on top of them."""
    pipeline = work.parallel.pipeline
    chunks = chunk_activations(work, rank)
    waiting = in_flight(rank, pipeline, work.micro_batches, chunks)
    most = max(waiting)
    held = _tied_placeholder(work)
    moments = [_layer_working(work) + held]
    if rank == pipeline - 1:
        moments.append(waiting[-1] - most + head_activations(work) + _head_working(work))
    if rank == 0:
        moments.append(waiting[0] - most + _embedding_working(work) + held - chunks[0])
    return most, max(moments) + _weight_casts(work, rank)


def _tied_placeholder(work: Workload) -> float:
    """What autograd keeps of the head's gradient until the embedding, which it is, has its own."""
    alone = work.model.tie_embeddings and work.parallel.pipeline == 1
    return _embedding_bytes(work) if alone and _makes_weight_gradients(work) and not fuses_head(work) else 0.0


def _weight_casts(work: Workload, rank: int) -> float:
    """Layers' matrices in FP8 and their transposes, which are kept while there are micro-batches to come."""
    return 2.0 * work.layer_matrices(rank) if work.fp8 != "none" and work.micro_batches > 1 else 0.0


def _layer_working(work: Workload) -> float:
    """The largest of three moments of a layer, with what was recomputed: the end of its forward pass, with what both
    of its parts gave and their sum; in the feed-forward part's backward pass the gradients of the second matrix, of
    what it reads and, gathered, of what it gives; or those of both halves of a gated activation."""
    hidden, tensor = work.model.hidden_size, work.parallel.tensor
    stream = stream_bytes(work)
    forward, gathered = stream + 2 * residual_bytes(work), stream if work.sequence_parallel > 1 else 0
    values = feed_forward_values(work) * work.bytes
    matrix = 0.0
    if _makes_weight_gradients(work):
        matrix = hidden * work.model.ffn_hidden_size / tensor * work.bytes
    if work.fp8 == "tensorwise" and work.trains_weights:  # what is added at a time is in fp32
        matrix = max(matrix, 4.0 * min(hidden * work.model.ffn_hidden_size / tensor, FP8_SLAB_VALUES))
    halves = 2 * values if work.model.gated else values
    if work.model.lora:
        # What an adapter adds, before and after it is scaled: to the layer's output, or to the halves before that.
        forward = max(forward + 2 * residual_bytes(work), residual_bytes(work) + 2 * halves - values)
    output = 0 if work.recompute == "none" else residual_bytes(work)  # made again too
    moments = (forward, gathered + values + matrix + output, halves + output)
    return max(moments) + layer_activations(work).remade


def _head_working(work: Workload) -> float:
    """On top of what the head keeps: the gradients of its weights and input, or before that what the loss makes of
    the logits."""
    implementation = work.implementation
    stream = stream_bytes(work)
    gradients = 2 * stream + (_embedding_bytes(work) if _makes_weight_gradients(work) else 0)
    if fuses_head(work):
        gradients -= 2 * stream + work.bytes * logits(work)  # the logits are gone, the stream's gradient was kept
    if implementation.fused_loss:
        widened = 4 if work.precision == "fp32" else 8  # without the largest, and in bf16 the logits themselves
        return max(gradients, widened * min(logits(work), implementation.loss_values))
    if work.precision == "fp32":
        return gradients
    return max(work.bytes * logits(work), gradients - (4 - work.bytes) * logits(work))


def _makes_weight_gradients(work: Workload) -> bool:
    """Whether there is a tensor for the gradient of a matrix, be it a placeholder."""
    made = work.implementation.gradient_placeholder or not work.implementation.fused_weight_gradient
    return work.trains_weights and made


def _embedding_working(work: Workload) -> float:
    """The gradient of the embedding, which is dense, and of its output."""
    return (_embedding_bytes(work) if work.trains_weights else 0.0) + stream_bytes(work)


def _embedding_bytes(work: Workload) -> float:
    return work.embedding_parameters * work.bytes


def _buffers(work: Workload) -> float:
    """The gathered sequence, which the engine keeps, and the gradient that a pass begins with; interleaving sends and
    receives besides while a pass runs."""
    gathered = stream_bytes(work) if work.sequence_parallel > 1 else 0.0
    return gathered + (4 if work.parallel.virtual_pipeline > 1 else 1) * residual_bytes(work)


def in_flight(rank: int, pipeline: int, micro_batches: int, chunk_bytes: list[float]) -> list[float]:
    """The most that waits on pipeline rank `rank` when a backward pass of each chunk begins, `chunk_bytes` for one
    micro-batch of each chunk.

    One chunk: 1F1B, where rank r runs p - r forward passes before its first backward pass. Several: megatron-core's
    interleaved schedule, which takes groups of p micro-batches through the chunks in turn.
    """
    if len(chunk_bytes) == 1:
        return [chunk_bytes[0] * min(pipeline - rank, micro_batches)]
    return _interleaved(rank, pipeline, micro_batches, np.asarray(chunk_bytes))


def _interleaved(rank: int, pipeline: int, micro_batches: int, chunk_bytes: np.ndarray) -> list[float]:
    chunks = len(chunk_bytes)
    total = micro_batches * chunks
    warmup = min(total, 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline)
    backward = np.arange(min(total, 2 * pipeline * chunks))  # from there on the pattern repeats
    forward = np.minimum(warmup + backward, total - 1)  # the last forward pass before each
    made = np.cumsum(chunk_bytes[np.arange(forward[-1] + 1) // pipeline % chunks])
    chunk = chunks - 1 - backward // pipeline % chunks
    freed = np.concatenate([np.zeros(1), np.cumsum(chunk_bytes[chunk])[:-1]])
    waiting = made[forward] - freed
    return [float(waiting[chunk == index].max()) for index in range(chunks)]
