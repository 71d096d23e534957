"""What is kept: by importance, in the old order, groups as wholes; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.config.schema import LoraConfig, ModelConfig, RunConfig, ShrinkConfig, StageConfig
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.shrink.boundary import given_importance, resumed_shrinking, shrunk_checkpoint
from flm_megatron.growth.shrink.choice import largest, make_shrink_plan, unmeasured_importance
from flm_megatron.growth.shrink.plan import Kept, ShrinkPlan
from flm_megatron.growth.shrink.rules import check_shrinking
from tests.support.growth_cases import old_model, plan_for, trained
from tests.support.shrink_cases import SMALLER, drawn_importance, shrink_plan

SMALL = SMALLER["all"]


def run_of(*models: ModelConfig, **shrink: Any) -> RunConfig:
    """A run of stages with these models, each smaller than the one before."""
    names = ["small", "smaller", "smallest"]
    stages = [
        StageConfig(names[i], model, tokens=2**20, shrink=ShrinkConfig(**shrink) if i else None)
        for i, model in enumerate(models)
    ]
    return RunConfig(stages=stages)


def test_of_equals_the_first_are_kept_and_order_stays() -> None:
    assert largest(np.array([[1.0, 3.0, 2.0, 3.0, 2.0]]), 3).tolist() == [[False, True, True, True, False]]
    kept = Kept.of(largest(np.array([[0.0] * 11, [*range(11)]]), 4))
    assert [kept.indices(row).tolist() for row in (0, 1)] == [[0, 1, 2, 3], [7, 8, 9, 10]]
    assert Kept.from_json(kept.to_json(), 2, 11) == kept
    with pytest.raises(ValueError, match="are not 6 bytes"):
        Kept.from_json(kept.to_json(), 3, 11)
    with pytest.raises(ValueError, match="not 0 bytes"):  # a forged number of rows sets no bound aside
        Kept.from_json(kept.to_json(), -1, 8)


def test_groups_are_kept_by_the_sum_of_their_heads_and_heads_by_their_own() -> None:
    old = old_model(num_attention_heads=6, num_query_groups=2)
    new = replace(old, num_attention_heads=2, num_query_groups=1)
    scores = torch.tensor([[9.0, 0, 0, 4, 5, 6], [1, 3, 2, 0, 0, 1], [2, 1, 2, 2, 2, 1]], dtype=torch.float64)
    plan = make_shrink_plan(old, new, ShrinkConfig(), drawn_importance(old, heads=scores), "small")
    assert [plan.heads.indices(layer).tolist() for layer in range(3)] == [[4, 5], [1, 2], [0, 2]]


def test_a_plan_of_the_largest_shapes_is_small_in_a_manifest() -> None:
    """140 layers of 98,304 feed-forward units, of which any half is kept: a bit for each, in base 64."""
    drawn = np.random.default_rng(0).random((140, 98_304))
    kept = Kept.of(drawn < 0.5)
    assert len(kept.to_json()) < 140 * 98_304 / 6 * 1.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 25}, "hidden_size grows from 24 to 25: shrinking only removes; give at most 24"),
        ({"num_layers": 2, "ffn_hidden_size": 51}, "a shape that grows and shrinks takes two stages"),
        ({"head_dim": 4}, "head dim changes from 6 to 4: shrinking removes whole heads; set model.head_dim to 6"),
        ({"head_dim": None, "hidden_size": 12}, "set model.head_dim to 6"),
        ({"num_query_groups": 1}, "query heads per group grow from 2 to 4"),
        ({"num_attention_heads": 3}, "3 query heads do not divide into 2 query groups"),
        ({"activation": "gelu"}, "in the shrunk one: shrinking keeps it, so set model.activation to 'swiglu'"),
        ({"vocab_size": 36}, "shrinking keeps the tokenizer and its vocabulary"),
        ({"lora": LoraConfig()}, "a model with adapters does not shrink"),
    ],
)
def test_what_cannot_be_cut_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words.replace("(", r"\(")):
        check_shrinking(old_model(), replace(old_model(), **changes))


def test_importance_of_another_model_or_criterion_is_refused() -> None:
    run = run_of(old_model(), replace(old_model(), **SMALL), ffn="gradient")
    source = trained(old_model())
    with pytest.raises(
        RequestError, match=r"is of another model: model\.ffn_hidden_size is 50 in the checkpoint and 5"
    ):
        shrunk_checkpoint(source, run, 1, drawn_importance(old_model(ffn_hidden_size=52)))
    with pytest.raises(RequestError, match=r"shrink.ffn is `gradient`, but the importance of ffn was measured by `act"):
        shrunk_checkpoint(source, run, 1, drawn_importance(old_model()))
    only_layers = run_of(old_model(), replace(old_model(), num_layers=1), ffn="gradient")
    assert shrunk_checkpoint(source, only_layers, 1, drawn_importance(old_model())).plan.new.num_layers == 1


def test_a_smaller_stage_begins_where_the_larger_one_stopped() -> None:
    run = run_of(old_model(), replace(old_model(), **SMALL))
    source = trained(old_model(), torch.float32, optimizer=True)
    shrunk = shrunk_checkpoint(source, run, 1, unmeasured_importance(old_model(), ShrinkConfig()))
    assert shrunk.manifest.position == StagePosition(0, None, None, 40, "smaller")
    assert shrunk_checkpoint(trained(old_model()), run, 1, drawn_importance(old_model())).record.moments is False
    saved = Manifest.from_json(json.loads(json.dumps(shrunk.manifest.to_json())))
    assert resumed_shrinking(run, 1, saved) == shrunk.plan
    with pytest.raises(RequestError, match=r"was shrunk with new.ffn_hidden_size = 21, and the run file now gives 20"):
        resumed_shrinking(run_of(old_model(), replace(old_model(), **{**SMALL, "ffn_hidden_size": 20})), 1, saved)


def test_masks_have_to_be_open() -> None:
    growth = plan_for("ffn", "mask", old_model())
    grown = GrownCheckpoint(trained(old_model()), growth)
    run = run_of(growth.new, replace(growth.new, **SMALL))
    with pytest.raises(RequestError, match=r"in the middle of its growth mask .v = 0\.000, open at step 4"):
        shrunk_checkpoint(grown, run, 1, drawn_importance(growth.new))


def test_a_run_file_with_smaller_stages_is_looked_at_before_anything_starts() -> None:
    large, small = old_model(), replace(old_model(), **SMALL)
    check_run_file(run_of(large, small, replace(small, num_layers=1)))
    with pytest.raises(Mistakes, match="num_layers grows from 2 to 3"):
        check_run_file(run_of(large, small, large))
    assert given_importance(run_of(large, small), 1) is None


def test_a_later_version_of_a_plan_is_refused() -> None:
    plan = shrink_plan(old_model())
    shrunk = {"shrink": {"plan": {**plan.to_json(), "version": 2}}}
    with pytest.raises(RequestError, match="the plan of a shrinking is not one that this program knows"):
        resumed_shrinking(run_of(old_model(), plan.new), 1, Manifest.from_json(shrunk))
    assert ShrinkPlan.from_json(plan.to_json()) == plan
