"""Masks that are still opening where another stage begins: they go on opening beside its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.growth.boundary import grown_checkpoint, resumed_plan, saved_mask_value, saved_plan
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.schedule import all_masks, still_opening
from tests.support.checkpoint_cases import edited
from tests.support.growth_cases import growth, old_model, trained
from tests.unit.growth.test_plan import run_of


def wide_then(*, opens_over: int = 15, **third: Any) -> RunConfig:
    """Stages of 10 steps: small, then wide behind masks that open over so many, then one that changes `third` too."""
    wide = old_model(hidden_size=33)
    stages = [
        StageConfig(name="small", model=old_model(), tokens=1280),
        StageConfig(name="wide", model=wide, tokens=1280, growth=growth("mask", mask_steps=opens_over)),
        StageConfig(name="last", model=replace(wide, **third), tokens=1280, growth=growth("mask")),
    ]
    return run_of(*stages)


def test_masks_go_on_opening_behind_a_growth_in_other_dimensions() -> None:
    run = wide_then(num_layers=5)
    check_run_file(run)
    wide, _ = grown_checkpoint(trained(old_model()), run, 1)
    source = trained(old_model(hidden_size=33))
    source.manifest = edited(wide.manifest, step=9)
    checkpoint, plan = grown_checkpoint(source, run, 2)
    assert plan.masked == ("layers",) and [m.masks.hidden for m in plan.earlier_masks] == [24]
    assert saved_plan(checkpoint.manifest) == plan, "also out of the manifest's text"
    assert resumed_plan(run, 2, checkpoint.manifest) == plan
    both = [[m.value(step) for m in all_masks(plan)] for step in (0, 2, 4, 6)]
    assert both == [[0.6, 0], [11 / 15, 0.5], [13 / 15, 1], [1, 1]]
    assert [saved_mask_value(edited(checkpoint.manifest, step=step)) for step in (0, 4, 6)] == [0, 13 / 15, 1]
    onward = still_opening(plan, 4)
    assert [(m.masks.hidden, m.done, m.left) for m in onward] == [(24, 13, 2)]


def test_a_dimension_behind_a_half_open_mask_does_not_grow_again() -> None:
    for third in ({"hidden_size": 36}, {"hidden_size": 36, "num_layers": 5}):
        with pytest.raises(Mistakes, match=r"'last' grows hidden in the middle of the growth mask of stage 'wide' \(v"):
            check_run_file(wide_then(**third))
        check_run_file(wide_then(opens_over=10, **third))
    run = wide_then(opens_over=10, hidden_size=36)
    wide, _ = grown_checkpoint(trained(old_model()), run, 1)
    source = trained(old_model(hidden_size=33))
    source.manifest = edited(wide.manifest, step=9)
    with pytest.raises(RequestError, match=r"\(v = 0\.900, open after 1 steps more\): train stage 'wide' until"):
        grown_checkpoint(source, run, 2)


def test_masks_open_before_the_run_ends() -> None:
    check_run_file(wide_then(opens_over=20, num_layers=5))
    with pytest.raises(Mistakes, match=r"mask_steps is 21, but it and those after it have 20 steps .* at most 20"):
        check_run_file(wide_then(opens_over=21, num_layers=5))
    run = wide_then(opens_over=20, num_layers=5)
    wide, _ = grown_checkpoint(trained(old_model()), run, 1)
    source = trained(old_model(hidden_size=33))
    source.manifest = edited(wide.manifest, step=8)
    with pytest.raises(RequestError, match=r"open after 12 steps more\), but has no more than 10 steps"):
        grown_checkpoint(source, run, 2)
