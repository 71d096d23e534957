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

REWARM_STEPS = 60
"""Steps of a warm-up of unknown length under `boundary: rewarm`: as in trunks of WSD runs, 40 to 100."""
REWARM_SHARE = 0.2
"""Largest share of its stage that such a warm-up takes."""
DECAY_SHARE = 0.1
REWARMED_DECAY_SHARE = 0.2
"""Fraction of a WSD schedule that decays where none is given, and where its stages are re-warmed."""


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


def warmup_tokens(stage: StageConfig, sequence_length: int, global_batch: int) -> int:
    """Length of a stage's warm-up in tokens: as given in either unit, else by its boundary.

    `sequence_length` and `global_batch` are those that the stage began with.
    """
    schedule = stage.schedule
    if schedule.warmup_samples is not None:
        return schedule.warmup_samples * sequence_length
    if schedule.warmup_tokens is not None or schedule.boundary != "rewarm":
        return schedule.warmup_tokens or 0
    return min(REWARM_STEPS * global_batch * sequence_length, round(REWARM_SHARE * stage.tokens))


def decay_fraction(schedule: ScheduleConfig) -> float:
    """Fraction of a WSD schedule that decays: as given, else by its boundary."""
    if schedule.wsd_decay_fraction is not None:
        return schedule.wsd_decay_fraction
    return REWARMED_DECAY_SHARE if schedule.boundary == "rewarm" else DECAY_SHARE


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
