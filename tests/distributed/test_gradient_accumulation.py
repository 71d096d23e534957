"""Weight gradients added straight to the fp32 buffers, against gradients that are computed first and added then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.adapters import WithNewAdapters
from flm_megatron.checkpoint.engine import load_state
from flm_megatron.checkpoint.initial import InitialCheckpoint
from flm_megatron.config.schema import LoraConfig, ParallelConfig, StageConfig
from flm_megatron.training.parallel import layout
from flm_megatron.training.step import Engine
from tests.distributed.layouts import GLOBAL_BATCH, SEQUENCE, STAGE, micro_batches, synthetic_batch
from tests.distributed.pool import Pool

MODEL = replace(STAGE.model, num_layers=4)
ROUNDING = 1e-6
SEVERAL = 2
"""Micro-batches of a step of the cases that accumulate."""


@dataclass(frozen=True)
class Found:
    """Gradient buffers of a rank after one step, one after the other, its linear weights that learn, and how many of
    those had their gradient added by the product."""

    gradients: Any
    linear: int
    added: int


def gradients(stage: StageConfig, fused: bool) -> Found:
    """One forward and backward pass of all micro-batches, with fused accumulation or without."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    with layout(stage.parallel, timeout_s=120):
        engine = Engine(stage, SEQUENCE)
        view: Any = InitialCheckpoint(replace(stage.model, lora=None), 7)
        if stage.model.lora:
            view = WithNewAdapters(view, stage.model, 7)
        load_state(view, engine.chunks, engine.optimizer)
        layers = [module for chunk in engine.chunks for module in chunk.modules()]
        linear = [layer for layer in layers if isinstance(layer, (ColumnParallelLinear, RowParallelLinear))]
        learning = [layer.weight for layer in linear if layer.weight.requires_grad]
        if not fused:
            for layer in linear:
                layer.gradient_accumulation_fusion = False
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        batch = micro_batches(synthetic_batch(0, stage.model.vocab_size or 0), stage.micro_batch)
        engine._losses(batch, forward_only=False)
        buffers = [buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers]
        assert all(buffer.dtype is torch.float32 for buffer in buffers)
        added = sum(weight.grad_added_to_main_grad for weight in learning)
        return Found(torch.cat(buffers).numpy().copy(), len(learning), added)


def both(stage: StageConfig) -> tuple[Found, Found]:
    """Without and with fused accumulation, on one rank."""
    return gradients(stage, fused=False), gradients(stage, fused=True)


def stage_of(parallel: ParallelConfig, micro_batches_of_step: int, **fields: Any) -> StageConfig:
    """The small stage under a layout."""
    micro = GLOBAL_BATCH // (parallel.data or 1) // micro_batches_of_step
    return replace(STAGE, **{"model": MODEL, "parallel": parallel, "micro_batch": micro, **fields})


def check(found: list[tuple[Found, Found]], tolerance: float) -> None:
    """All ranks have the same gradients both ways, and the second way did not add them afterwards."""
    for plain, fused in found:
        assert plain.added == 0 and fused.added == fused.linear == plain.linear
        exact, got = torch.from_numpy(plain.gradients), torch.from_numpy(fused.gradients)
        assert exact.abs().max() > 0
        assert (got - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(data=2),
        ParallelConfig(data=2, distributed_optimizer=False),
        ParallelConfig(data=2, overlap_grad_reduce=True, overlap_param_gather=True),
    ],
    ids=["t1", "t2", "t2s", "d2", "d2-plain", "d2-overlap"],
)
def test_of_one_micro_batch_they_are_equal_to_the_bit(pool: Pool, parallel: ParallelConfig) -> None:
    world = parallel.model_size * (parallel.data or 1)
    check(pool.run(world, both, stage_of(parallel, 1)), tolerance=0)


@pytest.mark.parametrize(
    ("parallel", "fields"),
    [
        (ParallelConfig(), {"precision": "fp32"}),
        (ParallelConfig(), {"recompute": "selective"}),
        (ParallelConfig(tensor=2, sequence=True), {"recompute": "full"}),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), {}),
        (ParallelConfig(data=2, overlap_grad_reduce=True), {}),
        (ParallelConfig(tensor=2), {"model": replace(MODEL, lora=LoraConfig(rank=4))}),
        (ParallelConfig(), {"trainable": "half"}),
    ],
    ids=["t1", "selective", "t2s-full", "p2v2", "d2-overlap", "t2-lora", "half"],
)
def test_of_several_micro_batches_they_are_equal_to_rounding(
    pool: Pool, parallel: ParallelConfig, fields: dict[str, Any]
) -> None:
    world = parallel.model_size * (parallel.data or 1)
    check(pool.run(world, both, stage_of(parallel, SEVERAL, **fields)), ROUNDING)


def test_in_bf16_they_are_equal_to_its_rounding(pool: Pool) -> None:
    """What is added up unrounded differs from rounded products by bf16's last place."""
    stage = stage_of(ParallelConfig(tensor=2, sequence=True), SEVERAL, precision="bf16")
    check(pool.run(2, both, stage), tolerance=2**-7)
