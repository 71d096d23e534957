"""Training with FP8 products: beside bf16, under tensor and sequence parallelism, and through a growth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flm_megatron.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, StageConfig
from flm_megatron.kernels.fp8 import Scaling
from flm_megatron.launch.run import train
from flm_megatron.training.metrics.events import GrowthEvent, read_events
from tests.distributed.growth.test_run import make_run
from tests.support.layouts import GLOBAL_BATCH, SEQUENCE, relative_difference, take_steps, train_state_under
from tests.support.pool import Pool
from tests.support.runs import losses, make_data

SCALINGS: list[Scaling] = ["tensorwise", "rowwise"]
STAGE = StageConfig(
    model=ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, vocab_size=100
    ),
    precision="bf16",
    global_batch=GLOBAL_BATCH,
    tokens=80 * GLOBAL_BATCH * SEQUENCE,
    optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4),
)
LAYOUTS = {"tensor": ParallelConfig(tensor=2), "tensor_sequence": ParallelConfig(tensor=2, sequence=True)}


def curves(parallel: ParallelConfig, stages: list[StageConfig], steps: int, batches: int) -> list[Any]:
    """For each stage the loss and gradient norm of every step, over the same few batches again and again."""
    return [curve(parallel, stage, steps, batches) for stage in stages]


def curve(parallel: ParallelConfig, stage: StageConfig, steps: int, batches: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of one stage."""
    with train_state_under(parallel, stage) as state:
        return [take_steps(state, range(step % batches, step % batches + 1))[0] for step in range(steps)]


def test_a_layout_changes_the_order_of_sums_only(pool: Pool) -> None:
    # In fp32 but for the products. The scale of a whole matrix is agreed upon by all ranks; that of a row which is
    # split differs by a power of two, which matters only to numbers below the smallest normal one.
    stages = [replace(STAGE, precision="fp32", fp8=scaling) for scaling in SCALINGS]
    (alone,) = pool.run(1, curves, ParallelConfig(), stages, 3, 3)
    for parallel in LAYOUTS.values():
        for found in pool.run(2, curves, parallel, stages, 3, 3):
            for scaling, ours, whole in zip(SCALINGS, found, alone, strict=True):
                assert relative_difference(ours, whole) < 2e-5, (parallel, scaling)


def curves_both_ways(parallel: ParallelConfig, stages: list[StageConfig], steps: int) -> list[Any]:
    """For each stage its curve, and that with norms and activations written."""
    found = curves(parallel, stages, steps, 1)
    with patch("flm_megatron.model.layer.casts_input", lambda layer: False):
        return list(zip(found, curves(parallel, stages, steps, 1), strict=True))


@pytest.mark.parametrize("layout", [pytest.param("tensor", marks=pytest.mark.slow), "tensor_sequence"])
def test_what_is_cast_as_it_is_computed_changes_no_number(layout: str, pool: Pool) -> None:
    stages = [
        replace(STAGE, micro_batch=2, fp8="tensorwise"),
        replace(STAGE, micro_batch=2, fp8="rowwise", recompute="selective"),
        replace(STAGE, micro_batch=2, fp8="rowwise", recompute="full"),
    ]
    for found in pool.run(2, curves_both_ways, LAYOUTS[layout], stages, 2):
        for fused, written in found:
            assert fused == written


def test_loss_curves_are_those_of_bf16(pool: Pool) -> None:
    stages = [STAGE, *(replace(STAGE, fp8=scaling) for scaling in SCALINGS)]
    (found,) = pool.run(1, curves, ParallelConfig(), stages, 40, 2)
    plain, *others = (torch.tensor([loss for loss, _ in values]) for values in found)
    assert plain[-1] < 0.3 * plain[0]
    for scaling, noisy in zip(SCALINGS, others, strict=True):
        assert 0 < (noisy - plain).abs().max() < 0.02 * plain[0], scaling


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_run_grows_behind_masks(scaling: Scaling, tmp_path: Path) -> None:
    make_data(tmp_path)
    wanted = {"precision": "bf16", "fp8": scaling}
    grown = {"model.hidden_size": 64, "model.num_attention_heads": 8}
    overrides = [f"--defaults.{name}={value}" for name, value in wanted.items()]
    run = make_run(tmp_path, tmp_path / "run", *overrides, *(f"--stages.1.{name}={n}" for name, n in grown.items()))
    assert train(run) == 0
    found = losses(tmp_path / "run")
    assert [line[0] for line in found] == ["small"] * 4 + ["big"] * 8
    # The certificate is in bf16; what FP8 adds to the loss at the boundary is far less than a step changes it.
    (growth,) = read_events(tmp_path / "run", GrowthEvent)
    assert growth.certificate
    measured = growth.certificate.comparisons[-1]
    assert measured.precision == "bf16"
    assert measured.loss_after == pytest.approx(measured.loss_before, rel=1e-4)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"fp8: linear layers with {scaling} scaling") == 2
