"""Weight gradients added straight to the fp32 buffers, against gradients that are computed first and added then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flm_megatron.config.schema import KernelsConfig, LoraConfig, ParallelConfig, StageConfig
from tests.support.buffers import MODEL, Found, gradient_buffers, relative_difference, stage_of
from tests.support.pool import Pool

ROUNDING = 1e-6
SEVERAL = 2
"""Micro-batches of a step of the cases that accumulate."""


def without_fusion(linear: list[Any]) -> None:
    """Let megatron-core compute gradients first and add them later."""
    for layer in linear:
        layer.gradient_accumulation_fusion = False


def both(stages: list[StageConfig]) -> list[tuple[Found, Found]]:
    """On one rank, each stage without and with fused accumulation."""
    return [
        (gradient_buffers(stage, KernelsConfig(), without_fusion), gradient_buffers(stage, KernelsConfig()))
        for stage in stages
    ]


def check(pool: Pool, stages: list[StageConfig], tolerance: float) -> None:
    """All ranks have the same gradients both ways, and the second way did not add them afterwards."""
    parallel = stages[0].parallel
    for rank in pool.run(parallel.processes, both, stages):
        for plain, fused in rank:
            assert plain.added == 0 and fused.added == fused.linear == plain.linear
            assert relative_difference(fused, plain) <= tolerance


def test_of_one_micro_batch_they_are_equal_to_the_bit(pool: Pool) -> None:
    check(pool, [stage_of(ParallelConfig(), 1)], tolerance=0)
    layouts = [
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(data=2),
        ParallelConfig(data=2, distributed_optimizer=False),
        ParallelConfig(data=2, overlap_grad_reduce=True, overlap_param_gather=True),
    ]
    check(pool, [stage_of(parallel, 1) for parallel in layouts], tolerance=0)


@pytest.mark.parametrize(
    ("parallel", "fields"),
    [
        (ParallelConfig(), [{}, {"recompute": "selective"}, {"trainable": "half"}]),
        (
            ParallelConfig(tensor=2, sequence=True),
            [{"recompute": "full"}, {"model": replace(MODEL, lora=LoraConfig(rank=4))}],
        ),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), [{}]),
        (ParallelConfig(data=2, overlap_grad_reduce=True), [{}]),
    ],
    ids=["one process", "tensor and sequence", "pipeline", "data"],
)
def test_of_several_micro_batches_they_are_equal_to_rounding(
    pool: Pool, parallel: ParallelConfig, fields: list[dict[str, Any]]
) -> None:
    check(pool, [stage_of(parallel, SEVERAL, **each) for each in fields], ROUNDING)


def test_in_bf16_they_are_equal_to_its_rounding(pool: Pool) -> None:
    """What is added up unrounded differs from rounded products by bf16's last place."""
    check(pool, [stage_of(ParallelConfig(tensor=2, sequence=True), SEVERAL, precision="bf16")], tolerance=2**-7)
