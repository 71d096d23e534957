"""Budgets, schedules and learning rates of a run whose batch and sequence length changed on the way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.config.budget import schedule_tokens, stage_budgets, stage_steps
from flm_megatron.config.history import History, Segment, SegmentSource, history_from_json, history_to_json
from flm_megatron.config.schema import DataConfig, OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from flm_megatron.errors import DamagedError
from flm_megatron.optim.learning_rate import learning_rate


def run_of(*stages: StageConfig, length: int = 10) -> RunConfig:
    """A run file."""
    return RunConfig(data=DataConfig(sequence_length=length), stages=list(stages))


def test_a_changed_batch_and_length_count_from_where_they_changed() -> None:
    """The rest of the tokens in steps of the new size, rounded up; the stage after follows at once."""
    run = run_of(StageConfig("a", tokens=1000, global_batch=8), StageConfig("b", tokens=300, global_batch=3), length=20)
    history = (Segment("a", 0, 0, 0, 5, 10), Segment("a", 6, 30, 300, 8, 10), Segment("a", 8, 46, 460, 8, 20))
    first, second = stage_budgets(run, history)
    assert first.steps == 8 + 4  # 540 tokens are left: 4 steps of 160
    assert [first.tokens_at(step) for step in (0, 5, 6, 7, 8, 9, 12)] == [0, 250, 300, 380, 460, 620, 1100]
    assert [first.sample_at(step) for step in (0, 5, 6, 7, 8, 9, 12)] == [0, 25, 30, 38, 46, 54, 78]
    assert (second.first_sample, second.first_token, second.steps) == (78, 1100, 5)


def test_finished_stages_stand_as_the_history_says() -> None:
    """Whatever the run file now says of them."""
    run = run_of(StageConfig("a", tokens=9999, global_batch=9), StageConfig("b", tokens=100, global_batch=5))
    history = (Segment("a", 0, 0, 0, 2, 10), Segment("a", 5, 10, 100, 4, 10), Segment("b", 0, 26, 260, 5, 10))
    first, second = stage_budgets(run, history)
    assert (first.steps, first.end_token) == (9, 260)
    assert (second.first_sample, second.steps, second.end_token) == (26, 2, 360)


def test_planned_stages_follow_one_another() -> None:
    """Three of them, each rounded up to its own whole steps."""
    run = run_of(*(StageConfig(name, tokens=100, global_batch=batch) for name, batch in (("a", 3), ("b", 7), ("c", 2))))
    budgets = stage_budgets(run)
    assert [(b.steps, b.first_sample, b.first_token, b.end_token) for b in budgets] == [
        (4, 0, 0, 120),
        (2, 12, 120, 260),
        (5, 26, 260, 360),
    ]
    assert [stage_steps(stage, 10) for stage in run.stages] == [4, 2, 5]


def test_a_budget_that_is_spent_has_no_steps_left() -> None:
    """A stage made shorter than it is long already ends where it stands."""
    run = run_of(StageConfig("a", tokens=50, global_batch=5))
    (budget,) = stage_budgets(run, (Segment("a", 0, 0, 0, 5, 10), Segment("a", 4, 20, 200, 8, 10)))
    assert budget.steps == 4


SEGMENTS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from([5, 10, 20])), min_size=1, max_size=5
)


def history_of(parts: list[tuple[int, int, int]]) -> History:
    """Segments of a stage `a` of (steps, batch, length), one after the other."""
    segments = []
    step = sample = token = 0
    for steps, batch, length in parts:
        segments.append(Segment("a", step, sample, token, batch, length))
        step, sample, token = step + steps, sample + steps * batch, token + steps * batch * length
    return tuple(segments)


@settings(max_examples=100, deadline=None)
@given(parts=SEGMENTS, extra=st.integers(1, 500))
def test_steps_go_through_every_sample_and_token_once(parts: list[tuple[int, int, int]], extra: int) -> None:
    """Each step begins where the one before ended, takes its own batch, and the last reaches the budget."""
    history = history_of(parts)
    tokens = history[-1].first_token + extra
    (budget,) = stage_budgets(run_of(StageConfig("a", tokens=tokens, global_batch=parts[-1][1])), history)
    for step in range(budget.steps):
        segment = budget.segment_at(step)
        assert budget.sample_at(step + 1) - budget.sample_at(step) == segment.global_batch
        assert budget.tokens_at(step + 1) - budget.tokens_at(step) == segment.step_tokens
    assert tokens <= budget.end_token < tokens + history[-1].step_tokens


@settings(max_examples=60, deadline=None)
@given(parts=SEGMENTS, kind=st.sampled_from(["cosine", "linear", "wsd"]), warmup=st.integers(0, 12))
def test_the_schedule_in_tokens_goes_on(parts: list[tuple[int, int, int]], kind: str, warmup: int) -> None:
    """With an end in tokens, a position has the rate of a run without changes, warm-up in samples and all."""
    history, (_, batch, length) = history_of(parts), parts[0]
    schedule = ScheduleConfig(kind=kind, warmup_samples=warmup, decay_tokens=5000)  # type: ignore[arg-type]
    stage = StageConfig(
        "a", tokens=5000, global_batch=batch, schedule=schedule, optimizer=OptimizerConfig(1.0, None, 0.1)
    )
    before = run_of(stage, length=length)
    now = run_of(replace(stage, global_batch=parts[-1][1]), length=parts[-1][2])
    budgets = stage_budgets(now, history)
    for step in range(min(budgets[0].steps, 60)):
        position = budgets[0].tokens_at(step + 1)
        assert learning_rate(position, now, 0, budgets) == learning_rate(position, before, 0)


def test_a_schedule_ends_with_its_stage_and_with_those_that_continue_it() -> None:
    """Its end moves with the budget's by less than a step, and the last step learns at the minimum."""
    stages = [
        StageConfig("a", tokens=1000, global_batch=10),
        StageConfig("b", tokens=500, global_batch=7, schedule=ScheduleConfig(boundary="continue")),
    ]
    history = (Segment("a", 0, 0, 0, 10, 10), Segment("a", 4, 40, 400, 13, 10))
    run = run_of(*stages)
    budgets = stage_budgets(run, history)
    assert schedule_tokens(run, 0, budgets) == budgets[1].end_token == 400 + 5 * 130 + 8 * 70
    assert learning_rate(budgets[1].end_token, run, 1, budgets) == stages[1].optimizer.min_lr


def test_a_history_is_read_back_as_it_was_written() -> None:
    """As JSON; what is none is refused."""
    sources = (SegmentSource("web", "data/web", weight=0.5, sha256="ab", tokens=100), SegmentSource("old", "data/old"))
    history = (Segment("a", 0, 0, 0, 4, 32, sources), Segment("a", 5, 20, 640, 8, 32))
    assert history_from_json(json.loads(json.dumps(history_to_json(history))), "manifest.json") == history
    for bad in ({"stage": "a"}, [{"stage": "a"}], [history_to_json(history)[0] | {"step": "x"}], None):
        with pytest.raises(DamagedError, match=r"manifest\.json: its history cannot be read"):
            history_from_json(bad, "manifest.json")


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (64, 1), (65, 2), (128, 2), (6400, 100)])
def test_a_stage_has_whole_steps(tokens: int, steps: int) -> None:
    assert stage_steps(StageConfig(tokens=tokens, global_batch=4), 16) == steps
