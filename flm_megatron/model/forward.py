"""Passes through the pipeline that train nothing, for evaluation, generation, certificates and importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.engine.schedules import Report, forward_backward
from flm_megatron.engine.types import ModelChunk

Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Token ids [batch, sequence], of one shape in all batches of a call.

    With `labels` of the same shape the output is losses instead of logits; `hidden` [batch, 1, sequence, keys] is true
    where attention must not look; `weights` [batch, sequence] are passed on to `finish`.
    """

    tokens: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None
    hidden: Tensor | None = None


@torch.no_grad()
def forward(
    chunk: ModelChunk, batches: Iterable[Batch], count: int, finish: Callable[[Batch, Tensor], Result]
) -> list[Result]:
    """Run `count` batches of one shape through the pipeline; returns results of `finish` on its last rank, else
    nothing.

    `finish(batch, output)` gets losses [batch, sequence] in nats, or logits [batch, positions, true vocabulary] on
    every tensor-parallel rank.
    """
    return _run(chunk, batches, count, finish, backward=False)


@torch.enable_grad()
def forward_and_backward(
    chunk: ModelChunk, batches: Iterable[Batch], count: int, finish: Callable[[Batch, Tensor], Result]
) -> list[Result]:
    """As `forward`, of batches with labels, each followed by the backward pass of the sum of its losses.

    Gradients go to whatever asks for them: parameters, or hooks on what layers compute.
    """
    return _run(chunk, batches, count, finish, backward=True)


def _run(
    chunk: ModelChunk,
    batches: Iterable[Batch],
    count: int,
    finish: Callable[[Batch, Tensor], Result],
    backward: bool,
) -> list[Result]:
    batches = iter(batches)
    first = next(batches, None)
    if first is None or count == 0:
        return []

    def step(data: Iterator[Batch], model: ModelChunk) -> tuple[Tensor, Report[Result]]:
        """The engine's forward step over one batch."""
        batch = next(data)
        device = current().torch_device
        labels = None if batch.labels is None else batch.labels.to(device)
        hidden = None if batch.hidden is None else batch.hidden.to(device)
        output = model(batch.tokens.to(device), None, hidden, labels=labels, runtime_gather_output=labels is None)

        def done(result: Tensor) -> tuple[Tensor, Tensor, Result]:
            """The loss to minimise, if any, and the result of `finish`."""
            shown = result if labels is not None else result[..., : model.true_vocab_size]
            loss = result.sum() if backward else result.new_zeros(())
            return loss, torch.ones((), dtype=torch.int, device=result.device), finish(batch, shown)

        return output, done

    return forward_backward(
        step,
        [_chain(first, batches)],
        [chunk],
        micro_batches=count,
        micro_batch=first.tokens.shape[0],
        sequence_length=first.tokens.shape[1],
        forward_only=not backward,
    )


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest


def is_output_rank() -> bool:
    """Whether this rank's results count: one tensor rank at the end of each pipeline."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
