"""What the growth study makes of its results: equal FLOPs, savings, token credit, and what it claims."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from benchmarks.growth.study.arms import ARMS
from benchmarks.growth.study.results import lines
from benchmarks.growth.study.runs import SCRATCH, Result, Study, copy_whole
from benchmarks.growth.study.sizes import SHAPES, Sizes
from flm_megatron.config.loader import load_run
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.planner.loss_law import first_reached

PER_TOKEN = 2.0


def scratch(seed: int, tokens: int, loss: float) -> Result:
    """A run from scratch."""
    return Result(SCRATCH, seed, 0.0, tokens / 100, PER_TOKEN * tokens, 0, tokens, loss, 5.0)


def grown(seed: int, loss: float) -> Result:
    """A run of 1,000 FLOPs, of which 500 small tokens took 250."""
    return Result("width: mask", seed, 1.25, 5.0, 1000.0, 500, 375, loss, 4.0)


CURVE = [scratch(seed, tokens, 8 - math.log10(tokens)) for seed in (1, 2, 3) for tokens in (100, 1000, 10_000)]


def test_savings_are_worked_out_against_the_curve_of_the_same_seed() -> None:
    (line,) = lines([*CURVE, grown(1, 8 - math.log10(625))], PER_TOKEN)
    (saving,) = line.savings
    assert saving.equal == pytest.approx(1250) and saving.saved == pytest.approx(0.2)
    assert saving.credit == pytest.approx((625 - 375) / 500)
    assert not line.claimed  # one seed


def test_nothing_is_claimed_within_twice_the_spread_or_beyond_the_curve() -> None:
    def line(*tokens: float) -> tuple[bool, bool]:
        """Whether savings are known and claimed for final losses of a run from scratch of so many tokens."""
        results = [grown(seed, 8 - math.log10(t)) for seed, t in enumerate(tokens, start=1)]
        (found,) = lines([*CURVE, *results], PER_TOKEN)
        return found.known, found.claimed

    assert line(620, 625, 630) == (True, True)
    assert line(400, 500, 900) == (True, False)
    assert line(620, 625, 20_000) == (False, False)


def test_beyond_the_curve_there_is_a_bound() -> None:
    last = PER_TOKEN * 10_000
    for loss, bound in ((3.9, 1 - 1000 / last), (4.1, None), (7.0, None)):
        (line,) = lines([*CURVE, grown(1, loss)], PER_TOKEN)
        assert line.savings[0].saved_more_than == (bound if bound is None else pytest.approx(bound))


def test_no_equal_flops_beyond_the_ends() -> None:
    curve = [(10.0, 4.0), (100.0, 3.0), (1000.0, 2.0)]
    assert first_reached(curve, 3.5) == pytest.approx(10**1.5)
    assert first_reached(curve, 2.0) == pytest.approx(1000)
    assert first_reached(curve, 4.1) is None and first_reached(curve, 1.9) is None


def test_small_models_cost_less_and_every_arm_has_one() -> None:
    sizes = Sizes(64, 4, 512)
    assert {arm.small for arm in ARMS.values()} | {"large"} == set(SHAPES)
    assert all(sizes.flops(name) < sizes.flops("large") for name in SHAPES if name != "large")


def test_a_copy_that_was_cut_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "trunk", tmp_path / "shared"
    (source / "checkpoints").mkdir(parents=True)
    (source / "metrics.jsonl").symlink_to("nowhere")
    with pytest.raises(shutil.Error):
        copy_whole(source, target)
    assert not target.exists()
    (source / "metrics.jsonl").unlink()
    (source / "metrics.jsonl").touch()
    copy_whole(source, target)
    assert {path.name for path in target.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {"trunk", "shared"}


@pytest.mark.parametrize("arm", ARMS)
def test_run_files_of_arms_keep_the_rules(arm: str, tmp_path: Path) -> None:
    study = Study(tmp_path, tmp_path, Sizes(64, 4, 512), (1.3, 5.0), 8)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(study.document(arm, 1, 0.325, 5.0, tmp_path)))
    check_run_file(load_run(path))
