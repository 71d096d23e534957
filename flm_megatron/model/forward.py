"""Passes through the pipeline that train nothing, for evaluation, generation, certificates and importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
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


Chunks = ModelChunk | Sequence[ModelChunk]
"""The model on this rank: one chunk, or those of its virtual pipeline stages in order."""
SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes by which the engine's modules know that sequences are cut over tensor-parallel ranks."""


@torch.no_grad()
def forward(
    chunks: Chunks, batches: Iterable[Batch], count: int, finish: Callable[[Batch, Tensor], Result]
) -> list[Result]:
    """Run `count` batches of one shape through the pipeline; returns results of `finish` on its last rank, else
    nothing.

    `finish(batch, output)` gets losses [batch, sequence] in nats, or logits [batch, positions, true vocabulary] on
    every tensor-parallel rank.
    """
    return _run(chunks, batches, count, finish, backward=False)


@torch.enable_grad()
def forward_and_backward(
    chunks: Chunks, batches: Iterable[Batch], count: int, finish: Callable[[Batch, Tensor], Result]
) -> list[Result]:
    """As `forward`, of batches with labels, each followed by the backward pass of the sum of its losses.

    Gradients go to whatever asks for them: parameters, or hooks on what layers compute.
    """
    return _run(chunks, batches, count, finish, backward=True)


def _run(
    chunks: Chunks,
    batches: Iterable[Batch],
    count: int,
    finish: Callable[[Batch, Tensor], Result],
    backward: bool,
) -> list[Result]:
    chunks = chunks if isinstance(chunks, Sequence) else [chunks]
    batches = iter(batches)
    first = next(batches, None)
    if first is None or count == 0:
        return []
    # The interleaved schedule wants whole groups of micro-batches: what is run besides is not reported.
    size = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1
    whole = -(-count // size) * size
    assert whole == count or not backward, "gradients of what is run besides would count"
    held = list(islice(chain([first], batches, repeat(first)), whole)) if len(chunks) > 1 else chain([first], batches)

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
        [iter(held) for _ in chunks],
        chunks,
        micro_batches=whole,
        micro_batch=first.tokens.shape[0],
        sequence_length=first.tokens.shape[1],
        forward_only=not backward,
    )[:count]


@contextmanager
def whole_sequences(chunks: Sequence[ModelChunk]) -> Iterator[None]:
    """During the block sequences are not cut over tensor-parallel ranks: any length will do, and a cache is possible.

    (The engine's own `set_model_to_sequence_parallel` remembers models by address, which the next stage's may have.)
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    configs = [module.config for module in modules if hasattr(module, "config")]
    holders = {(id(holder), name): holder for holder in (*modules, *configs) for name in SEQUENCE_PARALLEL}
    cut = [(holder, name) for (_, name), holder in holders.items() if getattr(holder, name, False) is True]
    for holder, name in cut:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in cut:
            setattr(holder, name, True)


def is_output_rank() -> bool:
    """Whether this rank's results count: one tensor rank at the end of each pipeline."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
