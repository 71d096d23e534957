"""Runs a checkpoint's model on text under a layout, for certificates and layer distances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.exchange.live import live_source
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.sharding.layout import check_layout
from flm_megatron.checkpoint.sharding.model_state import chunks_to_evaluate
from flm_megatron.config.rules.pipeline import divisors
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.distributed.channels import world_channel
from flm_megatron.distributed.processes import Processes
from flm_megatron.engine import parallel_state
from flm_megatron.engine.types import ModelChunk
from flm_megatron.errors import RequestError
from flm_megatron.growth.boundary import masks_as_saved
from flm_megatron.model.forward import Batch, forward

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM

T = TypeVar("T")
Layout = Callable[[ParallelConfig], AbstractContextManager[object]]
"""A context manager with megatron-core's groups for a layout over all processes of the world."""


def fitting_layout(model: ModelConfig, parallel: ParallelConfig, world: int) -> ParallelConfig:
    """`parallel` if `model` and the `world` processes fit it, else a smaller one; data parallelism takes the rest.

    A stage's layout fits its own model, but the smaller model that it grows from may have too few heads or layers for
    it, and a tool may run on fewer processes than training. Virtual pipelines are left out: they only save time.
    """
    if parallel.virtual_pipeline > 1:
        parallel = replace(parallel, virtual_pipeline=1, pipeline_layers=None)
    if _fits(model, parallel, world):
        return replace(parallel, data=None)
    smaller = [
        ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=parallel.sequence and tensor > 1)
        for tensor in divisors(parallel.tensor)
        for pipeline in divisors(parallel.pipeline)
    ]
    return max((p for p in smaller if _fits(model, p, world)), key=lambda p: (p.model_size, p.tensor))


def _fits(model: ModelConfig, parallel: ParallelConfig, world: int) -> bool:
    try:
        check_layout(model, parallel)
    except RequestError:
        return False
    return world % parallel.model_size == 0


def on_one_replica(
    checkpoint: LogicalCheckpoint,
    model: ModelConfig,
    stage: StageConfig,
    layout: Layout,
    measure: Callable[[Sequence[TeleFLM]], T],
) -> T | None:
    """The result of `measure(chunks)` on the ranks of the first data-parallel replica; none on the other ranks.

    The chunks are of `model` with a checkpoint's weights, ready to evaluate, growth masks as far open as they were,
    under the stage's layout or a smaller one that fits. The other replicas, which would read the same weights for the
    same numbers, wait at the world's store, without a collective that could time out. fp32 weights come from the
    checkpoint's masters if it has them. FP8 is off: its noise would hide what is measured, and the old model's sizes
    may not fit it.

    Raises:
        DamagedError: (on every rank) the checkpoint cannot be read.
    """
    parallel = fitting_layout(model, stage.parallel, dist.get_world_size())
    stage = replace(stage, model=model, parallel=parallel, micro_batch=1, recompute="none", fp8="none")
    processes = patient_processes()
    with layout(stage.parallel), torch.no_grad():
        first = parallel_state.get_data_parallel_rank() == 0
        chunks: list[TeleFLM] = []
        processes.together(lambda: chunks.extend(_chunks(checkpoint, stage, first)))
        # Not together: a rank that fails in a collective has to end, or the rest of its replica would wait there.
        masks_as_saved(chunks, model, checkpoint.manifest)
        found = measure(chunks) if first else None
        processes.on_first(lambda: None)
        return found


def _chunks(checkpoint: LogicalCheckpoint, stage: StageConfig, first: bool) -> list[TeleFLM]:
    """The chunks of the first replica; none elsewhere, where a rank gives what it holds of a live checkpoint."""
    if first:
        return chunks_to_evaluate(checkpoint, stage, alone=True)
    if (live := live_source(checkpoint)) is not None:
        live.give()
    return []


def patient_processes() -> Processes:
    """All processes of the world, which may wait hours for each other."""
    return Processes(world_channel("measuring"))


def forward_samples(
    chunks: Sequence[ModelChunk], tokens: torch.Tensor, on_logits: Callable[[int, torch.Tensor], None]
) -> None:
    """Run `tokens` [samples, sequence] through the pipeline of one replica, one sample at a time.

    On the last pipeline rank `on_logits(sample, logits)` is called, with logits [sequence, true vocabulary] gathered
    over tensor-parallel ranks.
    """
    samples = count()
    batches = (Batch(sample) for sample in tokens.split(1))
    forward(chunks[0], batches, len(tokens), lambda _, logits: on_logits(next(samples), logits[0]))
