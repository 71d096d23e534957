"""What happened in a run, read from its output folder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.errors import DamagedError, FlmError, RequestError
from flm_megatron.evaluation.run_folder import run_of
from flm_megatron.growth.record import Certificate, certificate_of
from flm_megatron.training.metrics.events import (
    FILE,
    ChangeEvent,
    EvaluationEvent,
    GrowthEvent,
    GrowthHealthEvent,
    Line,
    MetricsEvent,
    OtherEvent,
    RefusedEvent,
    RestartEvent,
    StepEvent,
    ValidationEvent,
    of_kind,
    read_lines,
)
from flm_megatron.training.metrics.flops import training_flops_per_token
from flm_megatron.training.metrics.goodput import Goodput, read_goodput

OF_A_STEP = ("step_time_s", "tokens_per_s_per_device")
"""Numbers without which a step is not drawn."""
Happening = RestartEvent | ChangeEvent | RefusedEvent


@dataclass(frozen=True)
class Position:
    """A place in a run: tokens seen, floating-point operations and seconds of training spent."""

    tokens: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class History:
    """A run's steps, validations and events in order, each with its position; certificates by stage."""

    name: str
    folder: Path
    run: RunConfig
    steps: list[tuple[Position, StepEvent]]
    validations: list[tuple[Position, ValidationEvent]]
    events: list[tuple[Position, Happening]]
    """Restarts, changes and refused steps."""
    certificates: dict[str, Certificate]
    """By the stage grown into."""
    boundaries: list[tuple[Position, str]]
    """Where each stage but the first begins."""
    health: list[tuple[Position, GrowthHealthEvent]] = field(default_factory=list)
    """What was measured of grown stages."""
    evaluations: list[tuple[Position, EvaluationEvent]] = field(default_factory=list)
    """What was measured besides between steps."""
    distances: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Of each old layer from the identity, by the stage whose layers were chosen by them."""
    goodput: Goodput | None = None
    """Where the wall time went; none for runs that did not meter it."""

    @property
    def restarts(self) -> int:
        """How often the run went on from a checkpoint inside a stage."""
        return sum(isinstance(event, RestartEvent) for _, event in self.events)

    @property
    def refused_steps(self) -> int:
        """Steps that were not applied."""
        return sum(isinstance(event, RefusedEvent) for _, event in self.events)

    def stages(self) -> Iterator[tuple[StageConfig, list[StepEvent]]]:
        """Each stage that has begun, with its steps."""
        for stage in self.run.stages:
            steps = [step for _, step in self.steps if step.stage == stage.name]
            if steps:
                yield stage, steps


def read_history(folder: Path) -> History:
    """The history of the run whose output folder this is.

    Raises:
        RequestError: it is no run's folder, or no step was taken yet.
        DamagedError: its metrics are not those of a run.
    """
    run = run_of(folder)
    lines = read_lines(folder) if (folder / FILE).is_file() else []
    _check_lines(folder, lines)
    if not of_kind(lines, StepEvent):
        raise RequestError(f"{folder} has no step in its {FILE} yet")
    placed = list(_placed(run, of_kind(lines, MetricsEvent)))
    steps = [(at, event) for at, event in placed if isinstance(event, StepEvent)]
    growths = of_kind(lines, GrowthEvent)
    return History(
        name=run.name,
        folder=folder,
        run=run,
        steps=steps,
        validations=[(at, event) for at, event in placed if isinstance(event, ValidationEvent)],
        events=[(at, event) for at, event in placed if isinstance(event, Happening)],
        certificates=_certificates(run, folder, growths),
        boundaries=_boundaries(steps),
        health=[(at, event) for at, event in placed if isinstance(event, GrowthHealthEvent)],
        evaluations=[(at, event) for at, event in placed if isinstance(event, EvaluationEvent)],
        distances={growth.stage: growth.distances for growth in growths if growth.distances},
        goodput=read_goodput(folder),
    )


def _check_lines(folder: Path, lines: list[Line]) -> None:
    """Raise DamagedError if a line lacks what its kind has, or a step what is drawn of it."""
    for number, line in enumerate(lines, 1):
        problem = line.problem if isinstance(line, OtherEvent) else ""
        if isinstance(line, StepEvent):
            problem = " and ".join(f"no {name}" for name in OF_A_STEP if math.isnan(getattr(line, name)))
        if problem:
            raise DamagedError(f"{folder / FILE}: object {number} has {problem}")


def _placed(run: RunConfig, events: list[MetricsEvent]) -> Iterator[tuple[Position, MetricsEvent]]:
    """Events with the cost of all steps up to them; those of stages that the run file no longer has are left out."""
    per_token = {stage.name: training_flops_per_token(stage.model, run.data.sequence_length) for stage in run.stages}
    at = Position(0, 0, 0)
    for event in events:
        if event.stage not in per_token:
            continue
        if isinstance(event, StepEvent):
            flops = at.flops + max(0, event.tokens - at.tokens) * per_token[event.stage]
            at = Position(event.tokens, flops, at.seconds + event.step_time_s)
        yield at, event


def _boundaries(steps: list[tuple[Position, StepEvent]]) -> list[tuple[Position, str]]:
    return [(at, after.stage) for (at, before), (_, after) in pairwise(steps) if before.stage != after.stage]


def _certificates(run: RunConfig, folder: Path, growths: list[GrowthEvent]) -> dict[str, Certificate]:
    """Certificates by the stage grown into: from the log, or else from the stage's checkpoint."""
    found = {growth.stage: growth.certificate for growth in growths if growth.certificate}
    store = CheckpointStore(folder / "checkpoints")
    for stage in run.stages[1:]:
        if stage.name in found:
            continue
        for path in store.newest(stage.name):
            certificate = _saved_certificate(path)
            if certificate:
                found[stage.name] = certificate
                break
    return found


def _saved_certificate(path: Path) -> Certificate | None:
    try:
        return certificate_of(open_checkpoint(path).manifest)
    except FlmError:  # a damaged checkpoint does not keep the report from being made
        return None
