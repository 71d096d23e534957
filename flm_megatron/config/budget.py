"""Where every stage and every schedule begins and ends, in steps, samples and tokens.

For planning this is arithmetic on the run file. A run in progress counts what its history records, and plans only the
rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flm_megatron.config.history import Segment
from flm_megatron.config.schema import RunConfig, ScheduleConfig, StageConfig


@dataclass(frozen=True)
class StageBudget:
    """The budget of one stage: its steps, in segments with one batch and one sequence length each."""

    steps: int
    segments: tuple[Segment, ...]

    @property
    def first_sample(self) -> int:
        """Samples of the run before this stage."""
        return self.segments[0].first_sample

    @property
    def first_token(self) -> int:
        """Tokens of the run before this stage."""
        return self.segments[0].first_token

    @property
    def sequence_length(self) -> int:
        """Tokens in the stage's first sample."""
        return self.segments[0].sequence_length

    @property
    def end_sample(self) -> int:
        """First sample after this stage."""
        return self.sample_at(self.steps)

    @property
    def end_token(self) -> int:
        """Tokens of the run at the end of this stage."""
        return self.tokens_at(self.steps)

    def segment_at(self, step: int) -> Segment:
        """The segment that step number `step` (from 0 on) belongs to."""
        return next((s for s in reversed(self.segments) if s.first_step <= step), self.segments[0])

    def sample_at(self, step: int) -> int:
        """Samples of the run after `step` steps of this stage."""
        return self.segment_at(step).sample_at(step)

    def tokens_at(self, step: int) -> int:
        """Tokens of the run after `step` steps of this stage."""
        return self.segment_at(step).tokens_at(step)


def stage_budgets(run: RunConfig, history: Sequence[Segment] = ()) -> list[StageBudget]:
    """Budgets of all stages: tokens rounded up to whole steps, each stage starting at the sample after the last.

    Stages in `history` are as recorded; its last one continues from its last segment to the run file's tokens, and
    later stages are planned. Without a history all are planned.
    """
    following = {before.stage: after for before, after in pairwise(history) if before.stage != after.stage}
    budgets: list[StageBudget] = []
    sample = token = 0
    for stage in run.stages:
        planned = Segment(stage.name, 0, sample, token, stage.global_batch, run.data.sequence_length)
        segments = tuple(segment for segment in history if segment.stage == stage.name) or (planned,)
        end = following[stage.name].first_token if stage.name in following else segments[0].first_token + stage.tokens
        budgets.append(StageBudget(_steps(segments[-1], end), segments))
        sample, token = budgets[-1].end_sample, budgets[-1].end_token
    return budgets


def _steps(last: Segment, end: int) -> int:
    """Steps of a stage whose last segment lasts to `end` tokens of the run, rounded up."""
    return last.first_step + max(0, math.ceil((end - last.first_token) / last.step_tokens))


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


def schedule_tokens(run: RunConfig, anchor: int, budgets: Sequence[StageBudget] | None = None) -> int:
    """Tokens from the start of the schedule that starts at stage `anchor` to its end.

    As given by `decay_tokens`, or else to the end of the last stage that continues it. `budgets` are those of a run
    under way; without them they are planned.
    """
    given = run.stages[anchor].schedule.decay_tokens
    if given is not None:
        return given
    budgets = stage_budgets(run) if budgets is None else budgets
    last = max(i for i in range(len(run.stages)) if schedule_start(run.stages, i) == anchor)
    return budgets[last].end_token - budgets[anchor].first_token
