"""Gradient buffers of the engine after one step's forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from flm_megatron import kernels
from flm_megatron.checkpoint.lazy.adapters import WithNewAdapters
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.config.schema import KernelsConfig, ParallelConfig, StageConfig
from flm_megatron.distributed.world import layout
from flm_megatron.training.step import TrainState
from tests.support.layouts import GLOBAL_BATCH, SEQUENCE, STAGE, micro_batches, synthetic_batch

MODEL = replace(STAGE.model, num_layers=4)


@dataclass(frozen=True)
class Found:
    """Mean loss of a step, a rank's gradient buffers one after the other, its linear weights that learn, and of how
    many of those the gradient was added by a product."""

    loss: float
    gradients: Any
    linear: int
    added: int


def stage_of(parallel: ParallelConfig, micro_batches_of_step: int, **fields: Any) -> StageConfig:
    """The small stage of the tests of layouts with fewer layers, under a layout."""
    micro = GLOBAL_BATCH // (parallel.data or 1) // micro_batches_of_step
    return replace(STAGE, **{"model": MODEL, "parallel": parallel, "micro_batch": micro, **fields})


def gradient_buffers(
    stage: StageConfig, wanted: KernelsConfig, prepare: Callable[[list[Any]], None] | None = None
) -> Found:
    """Run all micro-batches of one step; `prepare` may change the linear layers before."""
    from flm_megatron.engine.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    kernels.use(kernels.choose(wanted))
    with layout(stage.parallel, timeout_s=120):
        state = TrainState(stage, SEQUENCE)
        checkpoint: Any = InitialCheckpoint(replace(stage.model, lora=None), 7)
        if stage.model.lora:
            checkpoint = WithNewAdapters(checkpoint, stage.model, 7)
        load_state(checkpoint, state.chunks, state.optimizer)
        modules = [module for chunk in state.chunks for module in chunk.modules()]
        linear = [module for module in modules if isinstance(module, (ColumnParallelLinear, RowParallelLinear))]
        if prepare:
            prepare(linear)
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        batch = micro_batches(synthetic_batch(0, stage.model.vocab_size or 0), stage.micro_batch)
        loss, tokens, *_ = state._losses(batch, forward_only=False)
        buffers = [buffer.grad_data for chunk in state.chunks for buffer in cast(Any, chunk).buffers]
        assert all(buffer.dtype is torch.float32 for buffer in buffers)
        weights = [module.weight for module in linear if module.weight is not None]  # a tied head has none
        learning = [weight for weight in weights if weight.requires_grad]
        added = sum(weight.grad_added_to_main_grad for weight in learning)
        return Found(loss / tokens, torch.cat(buffers).numpy().copy(), len(learning), added)


def relative_difference(got: Found, exact: Found) -> float:
    """Largest difference of gradients over the largest gradient."""
    one, other = torch.from_numpy(got.gradients), torch.from_numpy(exact.gradients)
    assert other.abs().max() > 0
    return float((one - other).abs().max() / other.abs().max())
