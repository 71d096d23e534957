"""What the growth study writes for `flm advise`: the share of the small model's tokens that an operator kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.growth.study.credit import equal_tokens, table
from benchmarks.growth.study.results import lines
from benchmarks.growth.study.runs import SCRATCH, Result, Study, run_folder
from benchmarks.growth.study.sizes import Sizes
from flm_megatron.planner.advice.token_credit import read_credits
from flm_megatron.training.metrics.events import StepEvent, line_text, read_events

SIZES = Sizes(64, 4, 512)
FLOPS = SIZES.flops("large")
ARM, SMALL, LARGE = "depth: copy", 40_000, 80_000


def write_steps(folder: Path, stage: str, scale: float) -> None:
    """Metrics of 100 steps of 1,000 tokens whose loss is that of `scale` as many tokens from scratch."""
    folder.mkdir(parents=True)
    steps = [
        StepEvent(stage, i, i * 1000, 9 - (i * 1000 * scale) ** 0.1, 1.0, 1e-3, 0.1, 1.0, 1.0, None, 1.0, 1.0)
        for i in range(1, 101)
    ]
    (folder / "metrics.jsonl").write_text("".join(line_text(step) + "\n" for step in steps))


def result(arm: str, seed: int, flops: float, loss: float) -> Result:
    """A result of either kind at 10 tokens per parameter."""
    grown = arm != SCRATCH
    return Result(arm, seed, 1.0 if grown else 0.0, 10, flops, SMALL if grown else 0, LARGE, loss, 3.0)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two seeds whose small stage was worth 0.7 of its tokens, and savings by which 0.5 of them are counted."""
    found = []
    for seed in (1, 2):
        write_steps(run_folder(tmp_path, SCRATCH, 0.0, seed), "large", 1.0)
        write_steps(run_folder(tmp_path, ARM, 1.0, seed), "small", 0.7)
        found += [result(SCRATCH, seed, FLOPS * 90_000, 3.2), result(SCRATCH, seed, FLOPS * 100_000, 3.0)]
        found += [result(SCRATCH, seed, FLOPS * 110_000, 2.8), result(ARM, seed, FLOPS * 95_000, 3.0)]
    study = Study(tmp_path, tmp_path, SIZES, (10.0,), 1)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(vars(each)) + "\n" for each in found))
    return study


def test_tokens_to_the_same_loss_are_found_between_steps(study: Study) -> None:
    small, scratch = (read_events(run_folder(study.out, *of, 1), StepEvent) for of in ((ARM, 1.0), (SCRATCH, 0.0)))
    assert equal_tokens(small, scratch) == pytest.approx(70_000, rel=0.02)
    assert equal_tokens(scratch, small) is None, "the worse run never has the better one's loss"


def test_the_table_has_what_was_kept_and_is_read_by_the_advice(study: Study, tmp_path: Path) -> None:
    (path := tmp_path / "table.json").write_text(json.dumps(table(study, lines(study.results(), FLOPS))))
    (row,) = read_credits(path).measured
    assert (row.operator, row.factors, row.tokens_per_parameter) == (ARM, {"layers": 2}, 10)
    credit, equal = (100_000 - LARGE) / SMALL, 70_000 / SMALL
    assert row.kept == pytest.approx([credit / equal] * 2, rel=0.03)
    assert row.growth["layers"] == "copy"


def test_an_arm_of_one_seed_is_left_out(study: Study) -> None:
    found = [each for each in study.results() if each.seed == 1]
    assert table(study, lines(found, FLOPS))["measured"] == []
