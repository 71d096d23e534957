"""Where every stage and every schedule begins and ends, in steps, samples and tokens: arithmetic on the run file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flm_megatron.config.schema import RunConfig, ScheduleConfig, StageConfig


@dataclass(frozen=True)
class StageBudget:
    """One stage's part of the run: its steps, and where it starts in the stream of samples."""

    steps: int
    first_sample: int
    batch_samples: int
    sequence_length: int

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_samples * self.sequence_length

    @property
    def first_token(self) -> int:
        """Tokens of the run before this stage."""
        return self.first_sample * self.sequence_length

    @property
    def end_sample(self) -> int:
        """First sample after this stage."""
        return self.first_sample + self.steps * self.batch_samples

    def tokens_at(self, step: int) -> int:
        """Tokens of the run after `step` steps of this stage."""
        return self.first_token + step * self.step_tokens


def stage_budgets(run: RunConfig) -> list[StageBudget]:
    """Budgets of all stages: tokens rounded up to whole steps, each stage starting at the sample after the last."""
    budgets: list[StageBudget] = []
    sample = 0
    for stage in run.stages:
        steps = stage_steps(stage, run.data.sequence_length)
        budgets.append(StageBudget(steps, sample, stage.global_batch, run.data.sequence_length))
        sample = budgets[-1].end_sample
    return budgets


def stage_steps(stage: StageConfig, sequence_length: int) -> int:
    """Steps of a stage: its tokens rounded up to whole ones."""
    return math.ceil(stage.tokens / (stage.global_batch * sequence_length))


def warmup_tokens(schedule: ScheduleConfig, sequence_length: int) -> int:
    """Length of a warm-up in tokens, whichever unit it was given in."""
    if schedule.warmup_samples is not None:
        return schedule.warmup_samples * sequence_length
    return schedule.warmup_tokens


def schedule_start(stages: Sequence[StageConfig], stage_index: int) -> int:
    """Index of the stage at which the schedule of stage `stage_index` started."""
    while stage_index > 0 and stages[stage_index].schedule.boundary != "restart":
        stage_index -= 1
    return stage_index


def schedule_tokens(run: RunConfig, anchor: int) -> int:
    """Tokens from the start of the schedule that starts at stage `anchor` to its end.

    As given by `decay_tokens`, or else to the end of the last stage that continues it.
    """
    given = run.stages[anchor].schedule.decay_tokens
    if given is not None:
        return given
    budgets = stage_budgets(run)
    last = max(i for i in range(len(run.stages)) if schedule_start(run.stages, i) == anchor)
    return budgets[last].tokens_at(budgets[last].steps) - budgets[anchor].first_token
