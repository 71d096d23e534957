"""Goodput: the formula beside a run of made-up failures, and what `flm plan --mtbf` says."""

from __future__ import annotations

import json
import random

import pytest

from flm_megatron.cli.main import main
from flm_megatron.planner.goodput import Reliability
from tests.support import REPOSITORY

DAY = 86400.0


def simulated_goodput(reliability: Reliability, interval_s: float, failures: int) -> float:
    """Share of the time to `failures` random failures, restarts included, whose training was on the disk by then."""
    dice, wall, kept = random.Random(1), 0.0, 0.0
    cycle = interval_s + reliability.stall_s
    for _ in range(failures):
        runs = dice.expovariate(1 / reliability.mtbf_s)
        # The k-th save begins at k cycles less a stall, and is whole `save_s` later.
        whole = int((runs + reliability.stall_s - reliability.save_s) // cycle)
        kept += max(0, whole) * interval_s
        wall += runs + reliability.restart_s
    return kept / wall


@pytest.mark.parametrize(
    ("stall", "save", "interval"), [(30, 30, 1200), (300, 300, 6000), (5, 5, 300), (1, 200, 400), (0, 300, 3000)]
)
def test_the_formula_is_what_random_failures_give(stall: float, save: float, interval: float) -> None:
    reliability = Reliability(mtbf_s=DAY / 4, stall_s=stall, save_s=save, restart_s=600)
    measured = simulated_goodput(reliability, interval, failures=60_000)
    # Daly's formula lets restarts fail too, the simulation does not: about (R / M) squared apart.
    assert reliability.goodput(interval) == pytest.approx(measured, abs=3e-3)


def test_the_best_interval_is_the_best_of_all_and_near_youngs_for_short_stalls() -> None:
    for stall in (0.5, 30.0, 900.0):
        reliability = Reliability(mtbf_s=DAY, stall_s=stall, save_s=stall, restart_s=600)
        best = reliability.best_interval_s
        others = [best * factor for factor in (0.5, 0.8, 0.95, 1.05, 1.25, 2.0)]
        assert all(reliability.goodput(best) > reliability.goodput(other) for other in others)
        assert best == pytest.approx(reliability.young_interval_s, rel=0.12)


def test_a_save_in_the_background_is_not_begun_before_the_last_is_whole() -> None:
    reliability = Reliability(mtbf_s=DAY, stall_s=0.1, save_s=400.0, restart_s=600)
    assert reliability.best_interval_s == pytest.approx(399.9)


def test_failures_more_often_than_restarts_leave_nothing() -> None:
    assert Reliability(mtbf_s=1.0, stall_s=1.0, save_s=1.0, restart_s=1e6).goodput(100.0) == 0.0


def plan(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    """Status, output and errors of `flm plan` for the three stages of Tele-FLM."""
    run_file = REPOSITORY / "examples" / "tele-flm.yaml"
    sizes = [word for n in range(3) for word in (f"--stages.{n}.model.vocab_size", "80000")]
    status = main(["plan", str(run_file), "--gpu", "a800", "--gpus", "896", *sizes, *more])
    return status, *capsys.readouterr()


def test_the_plan_of_a_run_that_saves_in_the_background(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = plan(capsys, "--mtbf", "50700", "--json", "--checkpoint.asynchronous", "true")
    stage = json.loads(out)["goodput"]["tele-flm-1t"]
    assert status == 0
    assert stage["mtbf_s"] == pytest.approx(50700 * 3600 / 896)
    assert stage["save_s"] == pytest.approx(1083.7e9 * 14 / 50e9, rel=0.01)
    assert stage["goodput"] < stage["best_goodput"] < 1
    waits = json.loads(plan(capsys, "--mtbf", "50700", "--json", "--checkpoint.asynchronous", "false")[1])
    assert waits["goodput"]["tele-flm-1t"]["best_goodput"] < stage["best_goodput"]
    assert "best interval" in plan(capsys, "--mtbf", "50700")[1]
    assert "goodput" not in plan(capsys)[1]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "often"])
def test_a_failure_rate_that_is_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = plan(capsys, "--mtbf", value)
    assert status == 2 and "--mtbf" in errors and len(errors.splitlines()) == 1
