"""Buckets of gradients and weights that a data-parallel group reduces and gathers, as megatron-core lays them out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

from flm_megatron.planner.layout import Workload

PARAMETER_ALIGNMENT = 64
"""Values at whose multiples a parameter begins under the distributed optimizer."""
BUCKET_ALIGNMENT = 128
"""Values, besides the data-parallel size, of which a bucket then is a multiple."""
SMALLEST_BUCKET = 40_000_000
"""Values from which on a bucket is full, where gradients are reduced as they are made."""
BUCKET_PER_RANK = 1_000_000
"""The same for each data-parallel rank, where that is more."""


def gradient_bytes(work: Workload, rank: int) -> int:
    """Bytes of the gradients that pipeline rank `rank` reduces, padding included."""
    return work.implementation.gradient_bytes * rank_values(work, rank)


def weight_bytes(work: Workload, rank: int) -> int:
    """Bytes of the new weights that it gathers under the distributed optimizer, padding included."""
    return work.bytes * rank_values(work, rank)


def rank_values(work: Workload, rank: int) -> int:
    """Values in all its buckets."""
    return sum(map(sum, rank_buckets(work, rank)))


def rank_buckets(work: Workload, rank: int) -> list[list[int]]:
    """Values of each bucket of each model chunk of a pipeline rank, padding included; the engine sends those of a
    chunk behind the first together, which count as one."""
    last = work.parallel.pipeline - 1
    chunks = work.chunks(rank)
    found = [
        _buckets(work, layers, rank == 0 and index == 0, rank == last and index == len(chunks) - 1)
        for index, layers in enumerate(chunks)
    ]
    return [found[0], *([sum(buckets)] if buckets else [] for buckets in found[1:])]


def _buckets(work: Workload, layers: int, first: bool, last: bool) -> list[int]:
    """Only the first chunk of the first pipeline rank has several, as there nothing else hides the reduction, but for
    the bucket of its own that each copy of a tied embedding has."""
    ends = [*work.trained_shards["last"]] if last else []
    starts = [*work.trained_shards["first"]] if first else []
    stacked = work.trained_shards["layers"]
    alone = work.copied_embedding and work.parallel.distributed_optimizer
    before = [_end(work, ends.pop(0))] if alone and last else []
    after = [_end(work, starts.pop())] if alone and first else []
    if work.parallel.overlap_grad_reduce and first:
        return [*_filled(work, chain(ends, chain.from_iterable(repeat(stacked, layers)), starts)), *after]
    values = layers * _aligned(work, stacked) + _aligned(work, [*starts, *ends])
    return [*before, *([_end(work, values)] if values else []), *after]


def _filled(work: Workload, shards: Iterable[int]) -> Iterator[int]:
    """A bucket ends with the parameter that fills it."""
    full = max(SMALLEST_BUCKET, BUCKET_PER_RANK * work.data)
    values = 0
    for shard in shards:
        values = _up_to(values, _alignment(work)) + shard
        if values >= full:
            yield _end(work, values)
            values = 0
    if values:
        yield _end(work, values)


def _aligned(work: Workload, shards: Iterable[int]) -> int:
    return sum(_up_to(shard, _alignment(work)) for shard in shards)


def _alignment(work: Workload) -> int:
    return PARAMETER_ALIGNMENT if work.parallel.distributed_optimizer else 1


def _end(work: Workload, values: int) -> int:
    if not work.parallel.distributed_optimizer:
        return values
    return _up_to(values, math.lcm(work.data, BUCKET_ALIGNMENT))


def _up_to(values: int, multiple: int) -> int:
    return -(-values // multiple) * multiple
