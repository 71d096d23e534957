"""Weight gradients added straight to the fp32 buffers, against gradients that are computed first and added then."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from torch import nn

from flm_megatron.config.schema import KernelsConfig, LoraConfig, ParallelConfig, StageConfig
from flm_megatron.kernels import fp8
from tests.support.buffers import MODEL, Found, gradient_buffers, relative_difference, stage_of
from tests.support.pool import Pool

ROUNDING = 1e-6
FP8_MODEL = replace(MODEL, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2)
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


def fp8_without_fusion(linear: list[Any]) -> None:
    """Let layers with FP8 products compute gradients first, and leave them to be added later."""
    without_fusion([layer for layer in linear if type(layer).__name__.startswith("Fp8")])


def fp8_both(stages: list[StageConfig]) -> list[tuple[Found, Found, int]]:
    """On one rank, each stage without and with fused accumulation, and how often a step with it cast a weight."""
    found = []
    for stage in stages:
        with patch.object(fp8, "quantize", wraps=fp8.quantize) as casts:
            fused = gradient_buffers(stage, KernelsConfig())
        weights = sum(isinstance(call.args[0], nn.Parameter) for call in casts.call_args_list)
        with patch("flm_megatron.training.step.weights_cast_once", lambda *_: nullcontext()):
            plain = gradient_buffers(stage, KernelsConfig(), fp8_without_fusion)
        found.append((plain, fused, weights))
    return found


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(tensor=2, sequence=True)], ids=["one process", "tensor and sequence"]
)
def test_of_fp8_products_they_are_the_same_and_weights_are_cast_once(pool: Pool, parallel: ParallelConfig) -> None:
    """By rows to the bit, since the product is rounded to bf16 in either case; else what is added is not rounded."""
    common = {"model": FP8_MODEL, "precision": "bf16"}
    cases = [({"fp8": "rowwise", "recompute": "full"}, 0.0), ({"fp8": "tensorwise"}, 2**-7)]
    stages = [stage_of(parallel, SEVERAL, **common, **fields) for fields, _ in cases]
    for rank in pool.run(parallel.processes, fp8_both, stages):
        for (plain, fused, weights), (_, tolerance) in zip(rank, cases, strict=True):
            assert fused.added == fused.linear and plain.added == 1  # the head is in bf16
            assert plain.loss == fused.loss
            assert relative_difference(fused, plain) <= tolerance
            assert weights == 2 * (fused.linear - 1)  # one cast, and one of the transpose
