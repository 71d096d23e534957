"""What growth saved: the FLOPs of a grown run beside those at which training from scratch has its final loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.report.chart import Bracket, Chart, Series
from flm_megatron.evaluation.report.history import History, Position
from flm_megatron.model.parameters import parameter_count, parameter_specs
from flm_megatron.planner.loss_law import LossLaw, first_reached, read_laws
from flm_megatron.training.metrics.events import StepEvent

WINDOWS = 50
"""Training losses are means over this share of a run's steps."""
LAW_POINTS = 60
Measured = Literal["validation", "training"]


@dataclass(frozen=True)
class ScratchCurve:
    """Loss of the last stage's model trained from scratch, as (FLOPs, loss) in order of FLOPs."""

    name: str
    points: list[tuple[float, float]]
    flops_per_token: float
    law: LossLaw | None = None
    """What the points follow, if they were not measured: then it holds beyond them too."""

    def equivalent(self, loss: float) -> tuple[float, Literal["", ">", "<"]]:
        """FLOPs at which the curve first has `loss`, straight between points over the logarithm of FLOPs.

        With ">" the curve ends above that loss, and the FLOPs are where it ends; with "<" it begins at or below it,
        and they are where it begins.
        """
        if self.law and loss > self.law.floor:
            return float(self.law.tokens(np.asarray(loss))) * self.flops_per_token, ""
        if self.points[0][1] <= loss:
            return self.points[0][0], "<"
        at = first_reached(self.points, loss)
        return (self.points[-1][0], ">") if at is None else (at, "")


@dataclass(frozen=True)
class Saving:
    """A grown run at its end beside from scratch; "small" is all stages before the last that has begun.

    `equivalent` are the FLOPs at which training from scratch has `loss`; with `bound` ">" they are more, with "<" less.
    `flops_ratio` is that of the FLOPs per token of the small and of the large stages.
    """

    name: str
    scratch: str
    measured: Measured
    loss: float
    flops: float
    equivalent: float
    bound: Literal["", ">", "<"]
    small_tokens: float
    large_tokens: float
    scratch_tokens: float
    flops_ratio: float
    parameters: int

    @property
    def saved(self) -> float:
        """Share of the from-scratch FLOPs that growth saved; below 0 where it cost more."""
        return 1 - self.flops / self.equivalent

    @property
    def token_credit(self) -> float:
        """Tokens from scratch that a token of the small stages was worth.

        The grown run spent small x c_small + large x c_large FLOPs and from scratch T_eq = scratch x c_large, so it
        saved exactly where (scratch - large) / small is above c_small / c_large, `flops_ratio`.
        """
        return (self.scratch_tokens - self.large_tokens) / self.small_tokens


@dataclass(frozen=True)
class Savings:
    """What a page says of growth: each grown run's saving, their courses, the curves beside them."""

    rows: list[Saving]
    courses: list[Series]
    curves: list[Series]
    marks: list[tuple[tuple[float, ...], str]]

    def chart(self) -> Chart:
        """Loss against FLOPs, each saving as a bracket from the grown run's end to the same loss from scratch."""
        series = [*self.courses, *self.curves]
        lines = [Series(line.name, line.points, index, line.dots) for index, line in enumerate(series)]
        brackets = [Bracket(row.flops, row.equivalent, row.loss, percent(row)) for row in self.rows]
        return Chart(
            "Loss against FLOPs, grown and from scratch",
            ("model FLOPs of all stages",),
            "nats per token",
            lines,
            self.marks,
            log_x=True,
            brackets=brackets,
            wide=True,
        )


def percent(row: Saving) -> str:
    """The saving in words: "31.0 % saved", "12.0 % more", with the bound where the curve does not reach so far."""
    text = f"{abs(100 * row.saved):.1f} % {'saved' if row.saved >= 0 else 'more'}"
    if not row.bound:
        return text
    return f"{'more' if row.bound == '>' else 'less'} than {100 * row.saved:.1f} % saved"


def savings(histories: Sequence[History], scratch: Sequence[History] = (), laws: Path | None = None) -> Savings | None:
    """Every grown run of `histories` beside from scratch: its law in `laws`, else `scratch`, else runs of one stage
    among `histories` that have the shape of its last stage. None where there is nothing to compare.

    Raises:
        RequestError: a run in `scratch` has several stages or another shape; or the laws cannot be read.
    """
    rows: list[Saving] = []
    courses: list[Series] = []
    curves: dict[str, Series] = {}
    marks: list[tuple[tuple[float, ...], str]] = []
    for history in (each for each in histories if each.boundaries and _course(each, "training")):
        found = _scratch_curve(history, histories, scratch, laws)
        if found is None:
            continue
        curve, measured = found
        course = _course(history, measured)
        rows.append(_saving(history, measured, course[-1], curve))
        courses.append(Series(history.name, [(at.flops, loss) for at, loss in course], dots=measured == "validation"))
        curves[f"{curve.name} {measured}"] = Series(curve.name, curve.points, dots=len(curve.points) < LAW_POINTS)
        marks += [((at.flops,), f"→ {stage}") for at, stage in history.boundaries]
    return Savings(rows, courses, list(curves.values()), list(dict.fromkeys(marks))) if rows else None


def _scratch_curve(
    history: History, histories: Sequence[History], scratch: Sequence[History], laws: Path | None
) -> tuple[ScratchCurve, Measured] | None:
    """The curve to compare a grown run with, and which of its losses to compare."""
    if laws:
        return _law_curve(_law(laws, history), history), "training"
    for run in scratch:
        _check_scratch(run, history)
    runs = list(scratch) or [each for each in histories if _is_from_scratch(each, _model(history))]
    runs = [each for each in runs if _course(each, "training")]
    if not runs:
        return None
    names = [_validation_sets(each) for each in (history, *runs)]
    measured: Measured = "validation" if names[0] and names.count(names[0]) == len(names) else "training"
    return _run_curve(runs, measured), measured


def _run_curve(runs: Sequence[History], measured: Measured) -> ScratchCurve:
    """One run's course; of several the ends, as each had decayed its learning rate there."""
    at, _ = runs[0].steps[-1]
    if len(runs) == 1:
        points = [(place.flops, loss) for place, loss in _course(runs[0], measured)]
        return ScratchCurve(f"{runs[0].name}, from scratch", points, at.flops / at.tokens)
    ends = sorted((place.flops, loss) for place, loss in (_course(run, measured)[-1] for run in runs))
    return ScratchCurve(f"ends of {len(runs)} runs from scratch", ends, at.flops / at.tokens)


def _law(laws: Path, history: History) -> LossLaw:
    stage = _last_stage(history)
    found = read_laws(laws, [each.name for each in history.run.stages])
    if stage not in found:
        raise RequestError(f"{laws} has no law for stage {stage!r} of {history.folder}")
    return found[stage]


def _law_curve(law: LossLaw, history: History) -> ScratchCurve:
    """The law, drawn from a twentieth of the run's FLOPs to beyond those at which it has the run's final loss."""
    end, loss = _course(history, "training")[-1]
    per_token = _large(history, end)[1]
    first, last = end.flops / 20, 2 * end.flops
    if loss > law.floor:
        last = max(last, min(1.5 * float(law.tokens(np.asarray(loss))) * per_token, 100 * end.flops))
    flops = [first * (last / first) ** (i / (LAW_POINTS - 1)) for i in range(LAW_POINTS)]
    name = f"law {law.floor:.4g} + {law.scale:.4g} D^-{law.exponent:.4g} of {_last_stage(history)}"
    return ScratchCurve(name, [(each, law.loss(each / per_token)) for each in flops], per_token, law)


def _saving(history: History, measured: Measured, end: tuple[Position, float], curve: ScratchCurve) -> Saving:
    at, loss = end
    equivalent, bound = curve.equivalent(loss)
    large_tokens, per_token = _large(history, at)
    boundary, _ = history.boundaries[-1]
    return Saving(
        name=history.name,
        scratch=curve.name,
        measured=measured,
        loss=loss,
        flops=at.flops,
        equivalent=equivalent,
        bound=bound,
        small_tokens=boundary.tokens,
        large_tokens=large_tokens,
        scratch_tokens=equivalent / curve.flops_per_token,
        flops_ratio=boundary.flops / boundary.tokens / per_token,
        parameters=parameter_count(_model(history)),
    )


def _large(history: History, end: Position) -> tuple[float, float]:
    """Tokens of the last stage up to `end`, and its FLOPs per token."""
    boundary, _ = history.boundaries[-1]
    tokens = end.tokens - boundary.tokens
    return tokens, (end.flops - boundary.flops) / tokens


def _course(history: History, measured: Measured) -> list[tuple[Position, float]]:
    """Loss by position: validations, or means of training losses over a share of the steps, stage by stage."""
    if measured == "validation":
        return [(at, event.loss) for at, event in history.validations if math.isfinite(event.loss)]
    size = max(1, len(history.steps) // WINDOWS)
    course = []
    for stage in dict.fromkeys(step.stage for _, step in history.steps):
        steps = [(at, step) for at, step in history.steps if step.stage == stage and math.isfinite(step.loss)]
        ends = range(len(steps), 0, -size)
        course += [_mean(steps[max(0, end - size) : end]) for end in reversed(ends)]
    return course


def _mean(steps: Sequence[tuple[Position, StepEvent]]) -> tuple[Position, float]:
    return steps[-1][0], sum(step.loss for _, step in steps) / len(steps)


def _validation_sets(history: History) -> frozenset[str]:
    """Names of the sets of the last validation, if it was made at the run's last step and is finite."""
    at, event = history.validations[-1] if history.validations else (None, None)
    if at is None or event is None or at.tokens != history.steps[-1][0].tokens or not math.isfinite(event.loss):
        return frozenset()
    return frozenset(event.by_set)


def _last_stage(history: History) -> str:
    return history.steps[-1][1].stage


def _model(history: History) -> ModelConfig:
    return next(stage.model for stage in history.run.stages if stage.name == _last_stage(history))


def _is_from_scratch(history: History, model: ModelConfig) -> bool:
    begun = history.run.checkpoint.initial is None and len(history.run.stages) == 1
    return begun and _shapes(_model(history)) == _shapes(model)


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in parameter_specs(model).items()}


def _check_scratch(run: History, grown: History) -> None:
    if _is_from_scratch(run, _model(grown)):
        return
    if len(run.run.stages) > 1:
        raise RequestError(f"--scratch {run.folder}: a run of {len(run.run.stages)} stages is not one from scratch")
    if run.run.checkpoint.initial is not None:
        raise RequestError(f"--scratch {run.folder}: it began from {run.run.checkpoint.initial}, not from scratch")
    raise RequestError(
        f"--scratch {run.folder}: its model has other shapes than stage {_last_stage(grown)!r} of {grown.folder}"
    )
