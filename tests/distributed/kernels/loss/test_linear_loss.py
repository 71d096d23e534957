"""Head and loss as one operation, against logits that are kept, in the training step of every kind of layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flm_megatron.config.schema import KernelsConfig, LoraConfig, ParallelConfig, StageConfig
from tests.support.buffers import MODEL, Found, gradient_buffers, relative_difference, stage_of
from tests.support.pool import Pool

MICRO_BATCHES = 2


def both(stages: list[StageConfig]) -> list[tuple[Found, Found]]:
    """On one rank, each stage with head and loss apart and as one."""
    return [
        (
            gradient_buffers(stage, KernelsConfig(head_and_loss="separate")),
            gradient_buffers(stage, KernelsConfig(head_and_loss="fused")),
        )
        for stage in stages
    ]


@pytest.mark.parametrize(
    "layouts",
    [
        [ParallelConfig()],
        [
            ParallelConfig(tensor=2),
            ParallelConfig(tensor=2, sequence=True),
            ParallelConfig(pipeline=2),
            ParallelConfig(pipeline=2, virtual_pipeline=2),
            ParallelConfig(data=2, overlap_grad_reduce=True),
        ],
        [ParallelConfig(tensor=2, pipeline=2, sequence=True)],
    ],
    ids=["1", "2", "4"],
)
def test_losses_and_gradients_are_equal_to_rounding(pool: Pool, layouts: list[ParallelConfig]) -> None:
    """The model has muP's multiplier on the logits and a padded vocabulary, the batch a mask."""
    assert MODEL.logit_multiplier != 1 and (MODEL.vocab_size or 0) % 128
    stages = [stage_of(parallel, MICRO_BATCHES) for parallel in layouts]
    world = layouts[0].processes
    for rank in pool.run(world, both, stages):
        for apart, fused in rank:
            assert fused.loss == pytest.approx(apart.loss, rel=1e-6)
            assert relative_difference(fused, apart) < 2e-6
            assert fused.added == fused.linear


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2, pipeline=2)], ids=["1", "4"])
def test_a_tied_head_adds_to_the_gradient_of_the_embedding(pool: Pool, parallel: ParallelConfig) -> None:
    stage = stage_of(parallel, MICRO_BATCHES, model=replace(MODEL, tie_embeddings=True))
    for rank in pool.run(parallel.processes, both, [stage]):
        for apart, fused in rank:
            assert fused.loss == pytest.approx(apart.loss, rel=1e-6)
            assert relative_difference(fused, apart) < 2e-6


def test_in_bf16_they_are_equal_to_its_rounding(pool: Pool) -> None:
    stage = stage_of(ParallelConfig(tensor=2, sequence=True), MICRO_BATCHES, precision="bf16")
    for rank in pool.run(2, both, [stage]):
        for apart, fused in rank:
            assert fused.loss == pytest.approx(apart.loss, rel=1e-3)
            assert relative_difference(fused, apart) < 2**-6


def test_a_frozen_head_gets_no_gradient(pool: Pool) -> None:
    stage = stage_of(ParallelConfig(tensor=2), MICRO_BATCHES, model=replace(MODEL, lora=LoraConfig(rank=4)))
    for rank in pool.run(2, both, [stage]):
        for apart, fused in rank:
            assert fused.linear == 0
            assert relative_difference(fused, apart) < 2e-6
