"""Forward and backward passes of micro-batches through the pipeline: megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from flm_megatron.engine.types import ModelChunk

Item = TypeVar("Item")
Reported = TypeVar("Reported")
Report = Callable[[Tensor], tuple[Tensor, Tensor, Reported]]
"""Given the output of a micro-batch: the loss to minimise, the number of its tokens, and what is to be returned."""


def forward_backward(
    step: Callable[[Iterator[Item], ModelChunk], tuple[Tensor, Report[Reported]]],
    iterators: Sequence[Iterator[Item]],
    chunks: Sequence[ModelChunk],
    *,
    micro_batches: int,
    micro_batch: int,
    sequence_length: int,
    forward_only: bool = False,
) -> list[Reported]:
    """Run `step` on every micro-batch in each of this rank's chunks, in the order that the layout's schedule asks for.

    Each chunk has an iterator of its own over the same micro-batches. Returns what was reported of each micro-batch on
    the last pipeline rank, nothing elsewhere.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(iterators) if len(iterators) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=micro_batches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )
