"""What the guard does on curves as real runs show them: spikes are left out, what lasts is gone along with."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from flm_megatron.checkpoint.manifest import SpikeState
from flm_megatron.config.schema import StabilityConfig
from flm_megatron.errors import FlmError
from flm_megatron.training.spikes import MOST_LEVELS, SpikeWatch, joined
from tests.support import REPOSITORY
from tests.support.spike_curves import CURVES, Curve, replay, replays, shift

PAGE = REPOSITORY / "benchmarks" / "reliability" / "spikes.md"
SEEDS = range(2)
CONFIG = StabilityConfig(window_steps=16)


@pytest.mark.parametrize("name", [name for name in CURVES if name.startswith(("20 spikes", "one loss"))])
def test_every_spike_of_one_step_is_left_out_and_nothing_else(name: str) -> None:
    for outcome in replays(name, SEEDS):
        assert set(outcome.refused) == outcome.spikes and outcome.ended is None and outcome.levels == 0


@pytest.mark.parametrize(
    "name",
    [
        "nothing happens",
        "warm-up",
        "heavy-tailed gradient norms",
        "data shift -20 %",
        "batch four times as large",
        "batch a quarter as large",
        "norm rises tenfold in 2,000 steps",
        "learning rate rewound",
    ],
)
def test_what_is_no_spike_is_never_refused(name: str) -> None:
    assert all(outcome.refused == [] for outcome in replays(name, SEEDS))


@pytest.mark.parametrize("name", [name for name in CURVES if name.startswith("data shift +")])
def test_a_lasting_shift_costs_a_few_steps_and_becomes_the_level(name: str) -> None:
    for outcome in replays(name, SEEDS):
        assert outcome.ended is None and outcome.levels >= 1 and 2 <= len(outcome.refused) <= 6


@pytest.mark.parametrize("name", ["4 bursts of 5 to 20 steps", "4 bursts of the norm, 5 to 20 steps"])
def test_a_burst_is_caught_and_does_not_end_the_run(name: str) -> None:
    for outcome in replays(name, SEEDS):
        assert outcome.ended is None and outcome.spikes <= set(outcome.refused)


@pytest.mark.parametrize("name", ["loss grows by 10 % a step", "losses that are not numbers from then on"])
def test_what_only_gets_worse_ends_the_run(name: str) -> None:
    assert all(outcome.ended == outcome.refused[2] for outcome in replays(name, SEEDS))


def test_the_table_in_the_benchmarks_names_every_curve() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == list(CURVES)


def shifted(seen: int, factor: float = 1.25) -> SpikeWatch:
    """A watch that has refused two steps of a loss `factor` times as high, after `seen` applied ones."""
    watch = SpikeWatch(CONFIG)
    for step in range(seen):
        assert watch.applied(2 + 0.01 * (step % 3), 1.0) is None
    for step in range(2):
        reason = watch.reason(2 * factor, 1.0)
        assert reason is not None
        watch.refused(step, reason, "samples", 2 * factor, 1.0)
    return watch


def test_a_new_level_is_told_and_spikes_above_it_are_seen_at_once() -> None:
    watch = shifted(16)
    assert watch.reason(2.5, 1.0) is None
    assert watch.applied(2.5, 1.0) == "new level of loss: 2.5 after 2.00937; 2 steps in a row were refused before it"
    assert watch.reason(2.51, 1.0) is None and watch.reason(2.7, 1.0) is not None
    assert watch.in_a_row == []


def test_a_level_is_held_against_what_follows_for_the_length_of_a_window() -> None:
    watch = shifted(16)
    watch.applied(2.5, 1.0)
    for since in ("no step", "1 step", "2 steps"):
        assert watch.reason(3.5, 1.0) == f"loss 3.5 is 40 % above 2.5, a new level with {since} applied since"
        watch.applied(2.5, 1.0)
    for _ in range(13):
        watch.applied(2.5, 1.0)
    assert "sigma above 2.5" in (watch.reason(3.5, 1.0) or "")


def test_a_level_goes_on_after_a_restart_in_the_middle_of_it() -> None:
    watch = shifted(16)
    again = SpikeWatch(CONFIG, SpikeState.model_validate(json.loads(json.dumps(watch.state().model_dump()))))
    for each in (watch, again):
        assert each.reason(2.5, 1.0) is None and each.applied(2.5, 1.0)
    assert again.state() == watch.state() == SpikeWatch(CONFIG, watch.state()).state()


def test_what_an_earlier_version_saved_is_read_and_does_not_end_the_run_again() -> None:
    saved = {"loss": [2 + 0.01 * (n % 3) for n in range(16)], "grad_norm": [1.0] * 16, "skipped": 2}
    in_a_row = ["step 7 (samples): high", "step 8 (samples): high"]
    watch = SpikeWatch(CONFIG, SpikeState.model_validate({**saved, "in_a_row": in_a_row}))
    for step in range(2):
        watch.refused(step, watch.reason(2.5, 1.0) or "", "samples", 2.5, 1.0)
    assert watch.reason(2.5, 1.0) is None and watch.skipped == 4


def test_values_that_are_not_finite_are_no_level() -> None:
    watch = shifted(16)
    assert watch.reason(math.inf, 1.0) == "loss is inf"
    spoiled = SpikeWatch(replace(CONFIG, max_in_a_row=9), shifted(16).state())
    spoiled.refused(3, "loss is nan", "samples", math.nan, 1.0)
    assert spoiled.reason(2.5, 1.0) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "stop"}, "a step was refused.*set stability.policy to skip"),
        ({"new_level_steps": 0}, "3 steps in a row were refused.*raise stability.max_in_a_row"),
        ({"max_in_a_row": 1}, "a step was refused.*stability.sigmas"),
    ],
)
def test_where_no_level_is_taken_the_end_says_what_to_do(change: dict[str, Any], words: str) -> None:
    watch = SpikeWatch(replace(CONFIG, **change))
    for step in range(16):
        watch.applied(2 + 0.01 * (step % 3), 1.0)

    def shift() -> None:
        for step in range(3):
            watch.refused(step, watch.reason(2.5, 1.0) or "", "samples", 2.5, 1.0)

    with pytest.raises(FlmError, match=words):
        shift()


def test_a_loss_that_goes_on_rising_from_level_to_level_ends_the_run() -> None:
    curve = Curve([2 + 0.001 * (n % 3) for n in range(200)], [1.0] * 200)
    for step in range(100, 200):
        curve.losses[step] += 0.05 * ((step - 100) // 4)
    outcome = replay(curve)
    assert outcome.ended is not None and 1 <= outcome.levels <= MOST_LEVELS


def test_gradient_norms_are_judged_by_their_logarithm() -> None:
    watch = SpikeWatch(CONFIG)
    for step in range(16):
        watch.applied(2.0, (0.5, 1.0, 2.0)[step % 3])
    assert watch.reason(2.0, 15.0) is None  # 4.7 deviations of the logarithms, 22 of the norms
    assert "the geometric mean of 16 steps" in (watch.reason(2.0, 60.0) or "")
    watch.applied(2.0, 0.0)
    assert watch.reason(2.0, 60.0) is not None


def test_two_shifts_in_a_row_are_two_levels() -> None:
    curve, second = (shift(factor)(random.Random(1)) for factor in (1.2, 1.45))
    curve.losses[600:] = second.losses[600:]
    outcome = replay(curve)
    assert outcome.levels == 2 and outcome.ended is None


def test_samples_of_a_large_step_are_named_in_a_short_line() -> None:
    names = [f"web {i}" for i in range(11)]
    assert joined(names) == "web 0, web 1, web 2, web 3, web 4, web 5, web 6, web 7 and 3 more"
    assert joined(iter(names[:8])) == "web 0, web 1, web 2, web 3, web 4, web 5, web 6, web 7"
    assert joined(names[:4], most=3) == "web 0, web 1, web 2 and 1 more" and joined([]) == ""
