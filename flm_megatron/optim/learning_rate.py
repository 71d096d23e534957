"""The learning rate as a pure function of the tokens consumed.

It depends on the run file, the run's history of batches and lengths, and a position alone: a checkpoint changes it in
no other way. `position` counts the tokens of the run including those of the step's own batch, so that the first step
learns and the last one learns at `min_lr` exactly. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flm_megatron.config.budget import (
    StageBudget,
    decay_fraction,
    schedule_start,
    schedule_tokens,
    stage_budgets,
    warmup_tokens,
)
from flm_megatron.config.schema import OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.optim.groups import DECAYED, Group, learning_rate_scales

if TYPE_CHECKING:
    from flm_megatron.engine.types import Optimizer


def learning_rate(
    position: int, run: RunConfig, stage_index: int, budgets: Sequence[StageBudget] | None = None
) -> float:
    """Learning rate of vectors at `position` (tokens of the run, including this step's) in stage `stage_index`.

    The shape of the schedule and its warm-up are those of the stage where it started: the nearest one, looking
    back, whose boundary is `restart` (or the first). The values `lr` and `min_lr` are the present stage's own.
    `budgets` are those of a run under way; without them they are planned. A warm-up in samples, or of unknown length,
    counts those of the length and batch that its stage began with.
    """
    stage, anchor = run.stages[stage_index], schedule_start(run.stages, stage_index)
    budgets = stage_budgets(run) if budgets is None else budgets
    shape = run.stages[anchor].schedule
    warmup = _warmup(run, anchor, budgets)
    end = schedule_tokens(run, anchor, budgets)

    def continued(at: int) -> float:
        """The continued schedule's rate at a position."""
        return scheduled(at - budgets[anchor].first_token, shape, stage.optimizer, warmup, end)

    done = position - budgets[stage_index].first_token
    rewarm = _warmup(run, stage_index, budgets)
    if stage_index > anchor and stage.schedule.boundary == "rewarm" and done < rewarm:
        return continued(position - done + rewarm) * done / rewarm
    return continued(position)


def _warmup(run: RunConfig, stage_index: int, budgets: Sequence[StageBudget]) -> int:
    """Tokens of the warm-up of a stage."""
    begun = budgets[stage_index].segments[0]
    return warmup_tokens(run.stages[stage_index], begun.sequence_length, begun.global_batch)


def scheduled(tokens: int, schedule: ScheduleConfig, options: OptimizerConfig, warmup: int, end: int) -> float:
    """Learning rate `tokens` after the start of a schedule that warms up over `warmup` and ends at `end` tokens."""
    if tokens < warmup:
        return options.lr * tokens / warmup
    if schedule.kind == "power":
        return _power(tokens, schedule, options, warmup)
    if schedule.kind == "constant":
        return options.lr
    if tokens >= end:
        return options.min_lr
    held = warmup if schedule.kind != "wsd" else max(warmup, end - round(decay_fraction(schedule) * end))
    if tokens <= held:
        return options.lr
    progress = (tokens - held) / (end - held)
    return options.min_lr + (options.lr - options.min_lr) * _REMAINING[schedule.kind](progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1.0 - progress


_REMAINING: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "wsd": _linear}
"""Fraction of the way from `min_lr` to `lr` that remains, by progress from 0 to 1 (wsd: of its final decay)."""


def _power(tokens: int, schedule: ScheduleConfig, options: OptimizerConfig, warmup: int) -> float:
    """lr x (tokens / start)^exponent beyond `start`, not below min_lr (power scheduler, arXiv 2408.13359)."""
    start = warmup if schedule.power_start_tokens is None else schedule.power_start_tokens
    if tokens <= start:
        return options.lr
    return max(options.min_lr, options.lr * (tokens / start) ** schedule.power_exponent)


def group_learning_rates(rate: float, stage: StageConfig) -> dict[Group, float]:
    """Learning rate of each parameter group where vectors learn at `rate`.

    Matrices follow the same schedule from their own peak, `matrix_lr`, times their scale (muP: 1/m).
    """
    options = stage.optimizer
    peaks: dict[Group, float] = {
        "matrix": options.matrix_lr or options.lr,
        "vocabulary": options.lr,
        "vector": options.lr,
    }
    scales = learning_rate_scales(parameter_specs(stage.model))
    return {group: rate * (peak / options.lr) * scales.get(group, 1.0) for group, peak in peaks.items()}


def set_learning_rates(optimizer: Optimizer, stage: StageConfig, rate: float) -> dict[Group, float]:
    """Write `lr`, `weight_decay`, `betas` and `eps` into every parameter group of a megatron-core optimizer.

    To be called before each step, with what `learning_rate` gives. All of these come from the run file at each
    step, whatever a checkpoint has put there. Returns the learning rate of each group.
    """
    rates = group_learning_rates(rate, stage)
    for group in optimizer.param_groups:
        tag: Group = group["group"]
        group["lr"] = group["max_lr"] = 0.0 if tag == "frozen" else rates[tag]
        group["betas"], group["eps"] = stage.optimizer.betas, stage.optimizer.eps
        group["weight_decay"] = stage.optimizer.weight_decay if tag in DECAYED else 0.0
    return rates
