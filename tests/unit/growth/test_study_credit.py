"""What the growth study writes for `flm advise`: the share of the small model's tokens that an operator kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.growth.study.credit import equal_tokens, table
from benchmarks.growth.study.held_out import predictions, text
from benchmarks.growth.study.results import lines
from benchmarks.growth.study.runs import SCRATCH, Result, Study, model_fields, run_folder
from benchmarks.growth.study.sizes import Sizes
from flm_megatron.config.schema import ModelConfig
from flm_megatron.planner.advice.token_credit import read_credits
from flm_megatron.training.metrics.events import StepEvent, line_text

SIZES = Sizes(64, 4, 512)
FLOPS = SIZES.flops("large")
ARM, SMALL, LARGE = "depth: copy", 40_000, 80_000


def write_run(folder: Path, stage: str, model: ModelConfig, scale: float) -> None:
    """A run's file and metrics: 100 steps of 1,000 tokens whose loss is that of `scale` as many from scratch."""
    folder.mkdir(parents=True)
    steps = [
        StepEvent(stage, i, i * 1000, 1 + 40 * (i * 1000 * scale) ** -0.3, 1.0, 1e-3, 0.1, 1.0, 1.0, None, 1.0, 1.0)
        for i in range(1, 101)
    ]
    (folder / "metrics.jsonl").write_text("".join(line_text(step) + "\n" for step in steps))
    (folder / "run.yaml").write_text(
        json.dumps({"stages": [{"name": stage, "tokens": 100_000, "model": model_fields(model)}]})
    )


def result(arm: str, seed: int, flops: float, loss: float) -> Result:
    """A result of either kind at 10 tokens per parameter."""
    grown = arm != SCRATCH
    return Result(arm, seed, 1.0 if grown else 0.0, 10, flops, SMALL if grown else 0, LARGE, loss, 3.0)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two seeds whose small stage was worth 0.7 of its tokens, and savings by which 0.5 of them are counted."""
    found = []
    for seed in (1, 2):
        write_run(run_folder(tmp_path, SCRATCH, 0.0, seed), "large", SIZES.model("large"), 1.0)
        write_run(run_folder(tmp_path, ARM, 1.0, seed), "small", SIZES.model("shallow"), 0.7)
        found += [result(SCRATCH, seed, FLOPS * 90_000, 3.2), result(SCRATCH, seed, FLOPS * 100_000, 3.0)]
        found += [result(SCRATCH, seed, FLOPS * 110_000, 2.8), result(ARM, seed, FLOPS * 95_000, 3.0)]
    study = Study(tmp_path, tmp_path, SIZES, (10.0,), 1)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(vars(each)) + "\n" for each in found))
    return study


def test_tokens_to_the_same_loss_are_those_of_the_pilots_laws(study: Study) -> None:
    (line,) = lines(study.results(), FLOPS)
    assert equal_tokens(study, line, (1,), SMALL) == pytest.approx(0.7 * SMALL, rel=0.01)
    assert equal_tokens(study, line, (1, 2), 2 * SMALL) == pytest.approx(1.4 * SMALL, rel=0.01)


def test_the_table_has_what_was_kept_and_is_read_by_the_advice(study: Study, tmp_path: Path) -> None:
    (path := tmp_path / "table.json").write_text(json.dumps(table(study, lines(study.results(), FLOPS))))
    (row,) = read_credits(path).measured
    assert (row.operator, row.factors, row.tokens_per_parameter) == (ARM, {"layers": 2}, 10)
    assert row.kept == pytest.approx([(100_000 - LARGE) / (0.7 * SMALL)] * 2, rel=0.01)
    assert row.growth["layers"] == "copy"


def test_an_arm_of_one_seed_is_left_out(study: Study) -> None:
    found = [each for each in study.results() if each.seed == 1]
    assert table(study, lines(found, FLOPS))["measured"] == []


def test_a_run_is_predicted_from_the_other_seed(study: Study) -> None:
    first, second = predictions(study)
    assert first.measured == second.measured == pytest.approx(0.05)
    assert first.by_seeds == pytest.approx(0.05, abs=1e-3) and first.by_budgets is None
    assert "From other seeds: 2 of 2" in text([first, second]) and "budgets: 0 of 0" in text([first, second])


def test_a_run_is_predicted_from_another_budget(study: Study) -> None:
    """At half the budget the seeds have kept 0.3 of the small stage's tokens where they kept 0.71."""
    kept = 0.3 * 0.7 * SMALL
    for each in (r for r in study.results() if r.arm == ARM):
        half = replace(each, budget=5.0, large_tokens=int(95_000 - kept), flops=FLOPS * 90_000, loss=3.1)
        with (study.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(vars(half)) + "\n")
    found = {(p.run.budget, p.run.seed): p for p in predictions(study)}
    share = found[10.0, 1].by_budgets
    assert share == pytest.approx(1 - 95_000 / (LARGE + kept), abs=2e-3)
