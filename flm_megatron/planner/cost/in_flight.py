"""How many micro-batches' activations a pipeline rank holds at once, by schedule."""

from __future__ import annotations

import numpy as np


def peak_in_flight(rank: int, pipeline: int, micro_batches: int, chunk_bytes: list[float]) -> float:
    """Largest sum of kept activations on pipeline rank `rank`, `chunk_bytes` for one micro-batch of each chunk.

    One chunk: 1F1B, where rank r runs p - r forward passes before its first backward pass. Several: megatron-core's
    interleaved schedule, which takes groups of p micro-batches through the chunks in turn.
    """
    if len(chunk_bytes) == 1:
        return chunk_bytes[0] * min(pipeline - rank, micro_batches)
    return _interleaved(rank, pipeline, micro_batches, np.asarray(chunk_bytes))


def _interleaved(rank: int, pipeline: int, micro_batches: int, chunk_bytes: np.ndarray) -> float:
    chunks = len(chunk_bytes)
    total = micro_batches * chunks
    warmup = min(total, 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline)
    passes = min(total, warmup + 2 * pipeline * chunks)  # from there on the pattern repeats
    order = np.arange(passes) // pipeline % chunks
    made = np.cumsum(chunk_bytes[order])
    freed = np.cumsum(chunk_bytes[chunks - 1 - order])
    before = np.concatenate([np.zeros(warmup + 1), freed])[:passes]  # backward passes done when forward k runs
    return float((made - before).max())
