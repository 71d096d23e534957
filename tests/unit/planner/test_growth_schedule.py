"""Loss laws and the division of a budget over the stages."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from flm_megatron.errors import RequestError
from flm_megatron.planner.growth_schedule import best_schedule
from flm_megatron.planner.loss_law import LossLaw, chinchilla_law, fit_law, read_laws

SMALL, MIDDLE, LARGE = (chinchilla_law(size) for size in (1e9, 4e9, 16e9))
COSTS = (1.0, 4.0, 16.0)


def test_a_law_is_found_again_from_its_losses() -> None:
    law = LossLaw(1.8, 300.0, 0.27)
    tokens = np.linspace(1e8, 1e11, 400)
    noise = np.random.default_rng(0).normal(0, 0.002, 400)
    found = fit_law(list(tokens), list(law.loss(tokens) + noise))
    later = np.array([2e11, 1e12])
    assert found.loss(later) == pytest.approx(law.loss(later), abs=0.02)


def test_tokens_are_the_inverse_of_loss() -> None:
    tokens = np.array([1e9, 1e10, 1e12])
    assert LARGE.tokens(LARGE.loss(tokens)) == pytest.approx(tokens)
    assert np.isinf(LARGE.tokens(np.array([LARGE.floor])))


def reached(laws: list[LossLaw], switches: tuple[float, ...], budget: float) -> float:
    """Loss of the last size when stages grow at the losses `switches`, spending all that is left on the last."""
    start, left = 0.0, budget
    for law, cost, until in zip(laws, COSTS, switches, strict=False):
        end = float(law.tokens(np.array(until)))
        left -= max(0.0, end - start) * cost
        start = max(start, end)
        start = float(laws[laws.index(law) + 1].tokens(np.array(float(law.loss(start)))))
    return float(laws[-1].loss(start + left / COSTS[-1])) if left >= 0 else float("inf")


def test_no_other_division_of_the_budget_is_better() -> None:
    """Against all pairs of switching losses of a coarse grid."""
    laws, budget = [SMALL, MIDDLE, LARGE], 3e13
    schedule = best_schedule(laws, COSTS, budget)
    grid = np.linspace(2.0, 4.0, 81)
    others = [reached(laws, (high, low), budget) for high, low in product(grid, grid) if high >= low]
    assert schedule.loss <= min(others) + 1e-3
    assert schedule.loss < schedule.loss_from_scratch


def test_the_budget_is_spent_and_not_more() -> None:
    for budget in (1e12, 1e13, 1e14):
        schedule = best_schedule([SMALL, MIDDLE, LARGE], COSTS, budget)
        spent = sum(tokens * cost for tokens, cost in zip(schedule.tokens, COSTS, strict=True))
        assert spent <= budget * 1.0001
        assert spent >= 0.8 * budget
        assert schedule.losses == sorted(schedule.losses, reverse=True)


def test_a_small_budget_stays_with_the_small_size() -> None:
    schedule = best_schedule([SMALL, LARGE], (1.0, 16.0), 1e10)
    assert schedule.tokens[0] > 0
    assert schedule.tokens[1] == 0


def test_one_size_trains_for_the_whole_budget() -> None:
    schedule = best_schedule([LARGE], [2.0], 2e12)
    assert schedule.tokens[0] == pytest.approx(1e12, rel=0.05)
    assert schedule.loss == pytest.approx(schedule.loss_from_scratch, abs=1e-2)


def test_a_budget_for_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="raise it"):
        best_schedule([LARGE], [1.0], 10.0)


def test_laws_come_from_numbers_and_from_metrics(tmp_path: Path) -> None:
    law = LossLaw(2.0, 100.0, 0.25)
    lines = [
        {"stage": "a", "step": step, "tokens": 1e6 * step, "loss": float(law.loss(1e6 * step))}
        for step in range(1, 200)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "laws.yaml").write_text("a: metrics.jsonl\nb: {floor: 1.5, scale: 90, exponent: 0.3}\n")
    laws = read_laws(tmp_path / "laws.yaml", ["a", "b", "c"])
    assert laws["b"] == LossLaw(1.5, 90.0, 0.3)
    assert laws["a"].loss(1e9) == pytest.approx(law.loss(1e9), abs=0.02)
    assert "c" not in laws


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("z: metrics.jsonl", "unknown stage 'z'; the run has a"),
        ("a: nothing.jsonl", "no metrics file"),
        ("a: {floor: 1}", "has to be floor, scale and exponent"),
        ("a: {floor: 1, scale: -1, exponent: 0.3}", "scale and exponent above 0"),
        ("3", "have to be a mapping"),
    ],
)
def test_wrong_laws_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "laws.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_laws(path, ["a"])


def test_losses_that_do_not_fall_are_refused() -> None:
    with pytest.raises(RequestError, match="do not fall"):
        fit_law(range(1, 50), range(1, 50))
    with pytest.raises(RequestError, match="too few"):
        fit_law([1, 2], [2, 1])


def test_a_law_fitted_to_a_grown_stage_counts_tokens_from_its_beginning(tmp_path: Path) -> None:
    """The metrics count the run's tokens; the law is of the stage's own."""
    law, before, step = LossLaw(1.5, 40.0, 0.2), 5e9, 1e7
    lines = [{"stage": "small", "step": n, "tokens": before * n / 5, "loss": 9.0} for n in range(1, 6)]
    own = [step * n for n in range(1, 301)]
    lines += [
        {"stage": "large", "step": n, "tokens": before + tokens, "loss": float(law.loss(tokens))}
        for n, tokens in enumerate(own, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "laws.yaml").write_text("large: metrics.jsonl")
    found = read_laws(tmp_path / "laws.yaml", ["small", "large"])["large"]
    assert (found.floor, found.scale, found.exponent) == pytest.approx((1.5, 40.0, 0.2), rel=1e-6)


def test_a_law_without_a_floor_is_found() -> None:
    tokens = np.geomspace(1e8, 1e11, 200)
    found = fit_law(list(tokens), list(LossLaw(0.0, 30.0, 0.1).loss(tokens)))
    assert found.exponent == pytest.approx(0.1) and found.floor == pytest.approx(0.0, abs=1e-6)


def test_losses_that_fall_on_and_on_get_no_floor_below_zero() -> None:
    """A straight line over log tokens is fitted best by a small exponent and a floor far below zero."""
    tokens = np.geomspace(1e8, 1e12, 200)
    assert fit_law(list(tokens), list(12 - np.log(tokens / 1e8))).floor >= 0
