"""What happened in a run, read from its output folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.errors import DamagedError, FlmError, RequestError
from flm_megatron.evaluation.stages import run_of
from flm_megatron.training.metrics.flops import training_flops_per_token
from flm_megatron.training.metrics.goodput import Goodput, read_goodput
from flm_megatron.training.metrics.plot import read_metrics

Line = dict[str, Any]
PLACE = ("stage", "step", "tokens")
OF_A_STEP = ("step_time_s", "tokens_per_s_per_device")
EVENTS = {"restart", "changed", "refused"}
"""Keys of the lines that say what happened."""


@dataclass(frozen=True)
class Position:
    """A place in a run: tokens seen, floating-point operations and seconds of training spent."""

    tokens: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class History:
    """A run's steps, validations and events in order, each line with its position; certificates by stage."""

    name: str
    folder: Path
    run: RunConfig
    steps: list[tuple[Position, Line]]
    validations: list[tuple[Position, Line]]
    events: list[tuple[Position, Line]]
    """Restarts, changes and refused steps."""
    certificates: dict[str, Line]
    """By the stage grown into."""
    boundaries: list[tuple[Position, str]]
    """Where each stage but the first begins."""
    goodput: Goodput | None = None
    """Where the wall time went; none for runs that did not meter it."""

    @property
    def restarts(self) -> int:
        """How often the run went on from a checkpoint inside a stage."""
        return sum("restart" in line for _, line in self.events)

    @property
    def refused_steps(self) -> int:
        """Steps that were not applied."""
        return sum("refused" in line for _, line in self.events)

    def stages(self) -> Iterator[tuple[StageConfig, list[Line]]]:
        """Each stage that has begun, with its steps."""
        for stage in self.run.stages:
            lines = [line for _, line in self.steps if line["stage"] == stage.name]
            if lines:
                yield stage, lines


def read_history(folder: Path) -> History:
    """The history of the run whose output folder this is.

    Raises:
        RequestError: it is no run's folder, or no step was taken yet.
        DamagedError: its metrics are not those of a run.
    """
    run = run_of(folder)
    lines = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    if not any("loss" in line for line in lines):
        raise RequestError(f"{folder} has no step in its metrics.jsonl yet")
    _check_lines(folder, lines)
    placed = list(_placed(run, lines))
    steps = [(at, line) for at, line in placed if "loss" in line]
    return History(
        name=run.name,
        folder=folder,
        run=run,
        steps=steps,
        validations=[(at, line) for at, line in placed if "val_loss" in line],
        events=[(at, line) for at, line in placed if EVENTS & line.keys()],
        certificates=_certificates(run, folder, lines),
        boundaries=_boundaries(steps),
        goodput=read_goodput(folder),
    )


def _check_lines(folder: Path, lines: list[Line]) -> None:
    """Raise DamagedError if a line lacks what every line of its kind has."""
    for number, line in enumerate(lines, 1):
        wanted = (*PLACE, *OF_A_STEP) if "loss" in line else PLACE
        if missing := [name for name in wanted if name not in line]:
            raise DamagedError(f"{folder / 'metrics.jsonl'}: object {number} has no {' and no '.join(missing)}")


def _placed(run: RunConfig, lines: list[Line]) -> Iterator[tuple[Position, Line]]:
    """Lines with the cost of all steps up to them; lines of stages that the run file no longer has are left out."""
    per_token = {stage.name: training_flops_per_token(stage.model, run.data.sequence_length) for stage in run.stages}
    at = Position(0, 0, 0)
    for line in lines:
        if line["stage"] not in per_token:
            continue
        if "loss" in line:
            flops = at.flops + max(0, line["tokens"] - at.tokens) * per_token[line["stage"]]
            at = Position(line["tokens"], flops, at.seconds + line["step_time_s"])
        yield at, line


def _boundaries(steps: list[tuple[Position, Line]]) -> list[tuple[Position, str]]:
    return [(at, after["stage"]) for (at, before), (_, after) in pairwise(steps) if before["stage"] != after["stage"]]


def _certificates(run: RunConfig, folder: Path, lines: list[Line]) -> dict[str, Line]:
    """Certificates by the stage grown into: from the log, or else from the stage's checkpoint."""
    found = {line["stage"]: line["certificate"] for line in lines if line.get("certificate")}
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


def _saved_certificate(path: Path) -> Line | None:
    try:
        manifest = open_checkpoint(path).manifest
    except FlmError:  # a damaged checkpoint does not keep the report from being made
        return None
    return manifest.get("certificate") or (manifest.get("growth") or {}).get("certificate")
