"""A checkpoint in the middle of a growth mask is evaluated with its masks as far open as they were."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.config.schema import GrowthConfig, ModelConfig, ParallelConfig
from flm_megatron.distributed.world import one_process
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint
from flm_megatron.evaluation.model import load_model
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import make_plan
from flm_megatron.growth.schedule import still_opening
from flm_megatron.model.forward import Batch, forward
from tests.support.evaluation_cases import MODEL
from tests.support.growth_cases import growth

TOKENS = torch.randint(4, 400, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(checkpoint: LogicalCheckpoint, model: ModelConfig) -> torch.Tensor:
    """Logits of TOKENS."""
    none: Any = None  # a forward pass needs no tokenizer
    evaluated = EvaluatedCheckpoint(Path("view"), checkpoint, model, none, "fp32", 16)
    return forward(load_model(evaluated, ParallelConfig()), [Batch(TOKENS)], 1, lambda _, x: x.clone())[0]


def test_masks_are_as_far_open_as_the_step_says() -> None:
    source = InitialCheckpoint(MODEL, seed=3)
    masks = GrowthConfig("mask", "mask", "mask", "mask", mask_steps=10, layer_selection="interleave")
    wanted = replace(MODEL, hidden_size=48, num_attention_heads=6, num_query_groups=3, head_dim=8, num_layers=6)
    plan = make_plan(MODEL, wanted, masks, seed=5, stage="grown")
    with one_process():
        before = logits(source, MODEL)
        closed, half, full = (
            logits(GrownCheckpoint(source, plan, Manifest(position=StagePosition(step, stage="grown"))), plan.new)
            for step in (0, 5, 10)
        )
    assert torch.allclose(closed, before, rtol=0, atol=1e-4 * float(before.std()))
    differences = [float((x - before).std() / before.std()) for x in (half, full)]
    assert min(differences) > 0.01 and float((half - full).std() / before.std()) > 0.01


def test_masks_of_two_growths_are_each_as_far_open_as_they_were() -> None:
    deep = make_plan(MODEL, replace(MODEL, num_layers=6), growth("mask", mask_steps=10), seed=5, stage="deep")
    first = GrownCheckpoint(InitialCheckpoint(MODEL, 3), deep, Manifest(position=StagePosition(6, stage="deep")))
    wide = make_plan(deep.new, replace(deep.new, ffn_hidden_size=80), growth("mask"), seed=5, stage="wide")
    wide = replace(wide, earlier_masks=still_opening(deep, 6))
    with one_process():
        half_deep = logits(first, deep.new)
        found = [
            logits(GrownCheckpoint(first, wide, Manifest(position=StagePosition(step, stage="wide"))), wide.new)
            for step in (0, 2, 4)
        ]
    assert torch.allclose(found[0], half_deep, rtol=0, atol=1e-4 * float(half_deep.std()))
    for opened, before in pairwise(found):  # layers at 0.6, 0.8, 1; feed-forward units at 0, 0.5, 1
        assert float((opened - before).std() / before.std()) > 0.01


def test_a_model_that_does_not_fit_the_layout_is_refused() -> None:
    from flm_megatron.errors import RequestError

    with one_process(), pytest.raises(RequestError, match="2 query groups cannot be split over tensor size 4"):
        none: Any = None
        load_model(
            EvaluatedCheckpoint(Path("x"), InitialCheckpoint(MODEL, 3), MODEL, none, "fp32", 16),
            ParallelConfig(tensor=4),
        )
