"""Every schedule against its closed form; warm-up, ends and stage boundaries."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    MupConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)
from flm_megatron.engine.types import Optimizer
from flm_megatron.optim.groups import Group
from flm_megatron.optim.learning_rate import group_learning_rates, learning_rate, set_learning_rates

SEQUENCE, BATCH = 10, 10
STEP = SEQUENCE * BATCH


def _stage(steps: int, lr: float = 1.0, min_lr: float = 0.1, **schedule: Any) -> StageConfig:
    return StageConfig(
        model=ModelConfig(vocab_size=64),
        global_batch=BATCH,
        tokens=steps * STEP,
        optimizer=OptimizerConfig(lr=lr, min_lr=min_lr),
        schedule=ScheduleConfig(**schedule),
    )


def _rates(*stages: StageConfig) -> list[list[float]]:
    """Learning rate of every step of every stage."""
    run = RunConfig(data=DataConfig(sequence_length=SEQUENCE), stages=list(stages))
    return [
        [learning_rate(budget.tokens_at(step + 1), run, index) for step in range(budget.steps)]
        for index, budget in enumerate(stage_budgets(run))
    ]


def _cosine(done: float) -> float:
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


CLOSED_FORMS = {
    "cosine": lambda t: _cosine((t - 20) / 80),
    "linear": lambda t: 1.0 - 0.9 * (t - 20) / 80,
    "wsd": lambda t: 1.0 if t <= 75 else 1.0 - 0.9 * (t - 75) / 25,
    "power": lambda t: 1.0 if t <= 40 else max(0.1, (t / 40) ** -2.0),
    "constant": lambda t: 1.0,
}
OPTIONS = {
    "wsd": {"wsd_decay_fraction": 0.25},
    "power": {"power_exponent": -2.0, "power_start_tokens": 40 * STEP},
}


@pytest.mark.parametrize("kind", sorted(CLOSED_FORMS))
def test_every_step_of_a_schedule(kind: str) -> None:
    (rates,) = _rates(_stage(100, kind=kind, warmup_tokens=20 * STEP, **OPTIONS.get(kind, {})))
    expected = [t / 20 if t < 20 else CLOSED_FORMS[kind](t) for t in range(1, 101)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_first_step_learns_and_the_last_is_at_the_minimum_exactly(kind: str) -> None:
    (rates,) = _rates(_stage(37, kind=kind, min_lr=0.123))
    assert rates[0] > 0.9 and rates[-1] == 0.123
    (warmed,) = _rates(_stage(37, kind=kind, warmup_tokens=5 * STEP))
    assert warmed[0] == pytest.approx(0.2) and warmed[4] == 1.0


def test_budget_that_is_not_whole_steps_ends_at_the_minimum() -> None:
    stage = _stage(10)
    stage.tokens -= 37
    (rates,) = _rates(stage)
    assert len(rates) == 10 and rates[-1] == 0.1


def test_warm_up_in_samples() -> None:
    (samples,) = _rates(_stage(20, warmup_samples=4 * BATCH))
    (tokens,) = _rates(_stage(20, warmup_tokens=4 * STEP))
    assert samples == tokens and samples[1] == 0.5


def test_power_leaves_the_peak_at_the_end_of_the_warm_up_unless_told() -> None:
    (rates,) = _rates(_stage(100, kind="power", power_exponent=-0.51, warmup_tokens=25 * STEP))
    assert rates[24] == 1.0
    assert rates[99] == pytest.approx(4.0**-0.51)


def test_schedule_shorter_than_the_stage_stays_at_the_minimum() -> None:
    (rates,) = _rates(_stage(10, decay_tokens=6 * STEP))
    assert rates[4] > 0.1 and rates[5:] == [0.1] * 5


def test_schedule_longer_than_the_stage_is_cut() -> None:
    (rates,) = _rates(_stage(10, decay_tokens=40 * STEP))
    assert rates[-1] == pytest.approx(_cosine(10 / 40))


def test_restart_begins_anew() -> None:
    first, second = _rates(_stage(10), _stage(20, lr=2.0, boundary="restart", warmup_tokens=4 * STEP))
    assert first[-1] == 0.1
    assert second[:4] == [0.5, 1.0, 1.5, 2.0]
    assert second[-1] == 0.1


def test_continue_is_one_schedule_over_both_stages() -> None:
    parts = _rates(_stage(10, warmup_tokens=3 * STEP), _stage(20, boundary="continue"))
    (whole,) = _rates(_stage(30, warmup_tokens=3 * STEP))
    assert parts[0] + parts[1] == whole


def test_continue_ends_where_the_next_restart_begins() -> None:
    first, second, third = _rates(_stage(10), _stage(5, boundary="continue"), _stage(7, boundary="restart"))
    (whole,) = _rates(_stage(15))
    (alone,) = _rates(_stage(7))
    assert first + second == whole and third == alone


def test_continue_takes_the_values_of_its_own_stage() -> None:
    _, second = _rates(_stage(10, kind="constant"), _stage(5, lr=0.5, boundary="continue"))
    assert second == [0.5] * 5


def test_rewarm_climbs_to_the_continued_value() -> None:
    first, second = _rates(_stage(10), _stage(20, boundary="rewarm", warmup_samples=5 * BATCH))
    (whole,) = _rates(_stage(30))
    assert first == whole[:10]
    assert second[4:] == whole[14:]
    assert second[:5] == pytest.approx([whole[14] * step / 5 for step in range(1, 6)])


def test_rewarm_through_three_stages_follows_the_first() -> None:
    *_, third = _rates(_stage(10), _stage(10, boundary="continue"), _stage(10, boundary="rewarm", warmup_tokens=STEP))
    (whole,) = _rates(_stage(30))
    assert third == whole[20:]


def test_one_wsd_schedule_over_stages_that_all_say_the_same() -> None:
    def stages(**given: Any) -> list[StageConfig]:
        """Three stages, as `defaults` make them."""
        return [_stage(steps, kind="wsd", boundary="rewarm", **given) for steps in (600, 200, 1200)]

    first, second, third = rates = _rates(*stages())
    assert rates == _rates(
        _stage(600, kind="wsd", warmup_tokens=60 * STEP, wsd_decay_fraction=0.2),
        _stage(200, boundary="rewarm", warmup_tokens=40 * STEP),  # a fifth of so short a stage
        _stage(1200, boundary="rewarm", warmup_tokens=60 * STEP),
    )
    assert first[59] == first[-1] == 1.0 and second[19] == 0.5 and second[39] == second[-1] == 1.0
    assert third[29] == 0.5 and set(third[59:800]) == {1.0} and third[800] < 1.0 and third[-1] == 0.1
    explicit = {"warmup_tokens": 0, "wsd_decay_fraction": 0.1}
    assert _rates(*stages(**explicit)) == _rates(
        *(_stage(s, kind="wsd", boundary="continue") for s in (600, 200, 1200))
    )


class _Optimizer:
    """Param groups as megatron-core's optimizer has them."""

    def __init__(self) -> None:
        self.param_groups = [{"group": g, "lr": 9.0, "max_lr": 9.0, "weight_decay": 9.0} for g in GROUPS]


GROUPS: list[Group] = ["matrix", "vector", "vocabulary"]


def _mup_stage(matrix_lr: float | None) -> StageConfig:
    model = ModelConfig(hidden_size=1024, vocab_size=64, mup=MupConfig(enabled=True, base_hidden_size=256))
    return StageConfig(model=model, optimizer=OptimizerConfig(lr=1e-3, matrix_lr=matrix_lr, weight_decay=0.1))


@pytest.mark.parametrize(("matrix_lr", "matrix"), [(None, 1e-3 / 4), (8e-3, 8e-3 / 4)])
def test_matrices_learn_at_their_own_peak_over_the_width_factor(matrix_lr: float | None, matrix: float) -> None:
    stage = _mup_stage(matrix_lr)
    rates = group_learning_rates(5e-4, stage)  # half way down from the peak of vectors
    assert rates == pytest.approx({"matrix": matrix / 2, "vocabulary": 5e-4, "vector": 5e-4})


def test_values_in_the_groups_are_replaced_at_every_step() -> None:
    optimizer, stage = _Optimizer(), _mup_stage(None)
    returned = set_learning_rates(cast(Optimizer, optimizer), stage, 1e-3)
    assert [g["lr"] for g in optimizer.param_groups] == [returned[g] for g in GROUPS] == [2.5e-4, 1e-3, 1e-3]
    assert [g["max_lr"] for g in optimizer.param_groups] == [2.5e-4, 1e-3, 1e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.1]
    assert [(g["betas"], g["eps"]) for g in optimizer.param_groups] == [((0.9, 0.95), 1e-8)] * 3
