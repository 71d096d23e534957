"""Micro-batches of one data-parallel rank, read ahead in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    import torch

    from flm_megatron.data.streams.stage_streams import Stream

Batch = dict[str, "torch.Tensor"]
STEPS_AHEAD = 4
"""Steps whose samples are fetched from a store before the one that is being put together."""


def rank_samples(start: int, global_batch: int, data_rank: int, data_size: int) -> range:
    """Samples of one rank in the global batch [start, start + global_batch): an equal, contiguous shard."""
    shard_size = global_batch // data_size
    return range(start + data_rank * shard_size, start + (data_rank + 1) * shard_size)


def batches(
    stream: Stream,
    start_sample: int,
    global_batch: int,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    prefetch: int = 2,
) -> Generator[list[Batch], None, None]:
    """For each step the rank's micro-batches, from the global batch that begins at `start_sample` on, without end.

    A micro-batch is the stream's fields stacked: [micro_batch, sequence] on the CPU. Over all ranks a step takes
    exactly the next `global_batch` samples, whatever `micro_batch` and `data_size` are. Up to `prefetch` steps are
    read ahead by a thread, which ends when the iterator is closed or dropped.

    Raises:
        RequestError: the batch is not divisible; or, at the step concerned, the stream ends.
    """
    _check_division(global_batch, micro_batch, data_size)
    share = rank_samples(0, global_batch, data_rank, data_size)
    return share_batches(stream, start_sample, global_batch, micro_batch, share, prefetch)


def share_batches(
    stream: Stream, start_sample: int, global_batch: int, micro_batch: int, share: range, prefetch: int = 2
) -> Generator[list[Batch], None, None]:
    """As `batches`, the micro-batches of the samples `share` of each global batch, whatever the layout.

    Raises:
        RequestError: at the step concerned, the stream ends.
    """
    return _ahead(_steps(stream, start_sample, global_batch, micro_batch, share), prefetch)


def validation_batches(
    stream: Stream, samples: int, global_batch: int, micro_batch: int, data_rank: int, data_size: int
) -> Iterator[list[Batch]]:
    """The rank's micro-batches over the first `samples` samples (all, if there are fewer), in global batches.

    Where the last global batch is longer than what is left, it is filled up with samples whose tokens are all
    masked, so that every layout sees the same tokens.

    Raises:
        RequestError: the batch is not divisible.
    """
    _check_division(global_batch, micro_batch, data_size)
    end = min(samples, stream.limit_samples or samples)
    share = rank_samples(0, global_batch, data_rank, data_size)
    for start in range(0, end, global_batch):
        _want(stream, start, global_batch, share, range(STEPS_AHEAD))
        mine = rank_samples(start, global_batch, data_rank, data_size)
        yield [_stack_masked(stream, mine[i : i + micro_batch], end) for i in range(0, len(mine), micro_batch)]


def _check_division(global_batch: int, micro_batch: int, data_size: int) -> None:
    if global_batch % (micro_batch * data_size):
        raise RequestError(
            f"global batch {global_batch} is not divisible by micro-batch {micro_batch} x data parallel {data_size}"
        )


def _stack_masked(stream: Stream, indices: range, end: int) -> Batch:
    """Samples stacked; those at or beyond `end` are sample 0, fully masked."""
    batch = _stack(stream, [index if index < end else 0 for index in indices])
    for row, index in enumerate(indices):
        if index >= end:
            batch["loss_mask"][row] = 0
    return batch


def _steps(stream: Stream, start: int, global_batch: int, micro_batch: int, share: range) -> Iterator[list[Batch]]:
    _want(stream, start, global_batch, share, range(STEPS_AHEAD))
    while True:
        stream.check_budget(start + global_batch)
        _want(stream, start, global_batch, share, range(STEPS_AHEAD, STEPS_AHEAD + 1))
        mine = range(start + share.start, start + share.stop)
        yield [_stack(stream, mine[i : i + micro_batch]) for i in range(0, len(mine), micro_batch)]
        start += global_batch


def _want(stream: Stream, start: int, global_batch: int, share: range, steps: range) -> None:
    """Have the rank's samples of the given steps after `start` brought here, if they lie in a store."""
    for first in (start + step * global_batch for step in steps):
        stream.want(range(first + share.start, first + share.stop))


def _stack(stream: Stream, indices: Sequence[int]) -> Batch:
    import torch

    samples = [stream[index] for index in indices]
    return {field: torch.stack([sample[field] for sample in samples]) for field in samples[0]}


def _ahead(steps: Iterator[list[Batch]], depth: int) -> Generator[list[Batch], None, None]:
    """Yield the items of `steps`, which a thread reads up to `depth` ahead."""
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(steps, ready, stop), name="data-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def _fill(steps: Iterator[list[Batch]], ready: queue.Queue[list[Batch] | BaseException], stop: threading.Event) -> None:
    try:
        for item in steps:
            if not _put(ready, item, stop):
                return
    except Exception as error:  # handed to the reader, which raises it
        _put(ready, error, stop)


def _put(
    ready: queue.Queue[list[Batch] | BaseException], item: list[Batch] | BaseException, stop: threading.Event
) -> bool:
    """Put `item` when there is room; false if stopped before."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
