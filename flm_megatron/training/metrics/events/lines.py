"""Reading and writing the lines: each kind is known by its key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.json_text import parse_json
from flm_megatron.training.metrics.events.changes import ChangeEvent, GrowthEvent, RestartEvent
from flm_megatron.training.metrics.events.event import PLACE, E, MetricsEvent, Values, floats_of, is_number
from flm_megatron.training.metrics.events.measures import EvaluationEvent, GrowthHealthEvent, ValidationEvent
from flm_megatron.training.metrics.events.steps import NewLevelEvent, RefusedEvent, SaveEvent, StepEvent

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class OtherEvent:
    """A line of an unknown kind or, with a `problem`, of a known kind whose fields are unusable."""

    values: Values
    problem: str = ""

    @property
    def stage(self) -> str | None:
        """The stage, if the line has one."""
        found = self.values.get("stage")
        return found if isinstance(found, str) else None

    @property
    def step(self) -> int | None:
        """The step, if the line has one."""
        found = self.values.get("step")
        return found if isinstance(found, int) else None

    def to_json(self) -> dict[str, object]:
        """The values as they were read."""
        return dict(self.values)

    def scalars(self) -> dict[str, float]:
        """The line's numbers that are drawn over steps, by name."""
        return floats_of(self.values)


Line = MetricsEvent | OtherEvent


KINDS: tuple[type[MetricsEvent], ...] = (
    StepEvent, RefusedEvent, ValidationEvent, RestartEvent, ChangeEvent, GrowthEvent, NewLevelEvent,
    GrowthHealthEvent, EvaluationEvent, SaveEvent,
)  # fmt: skip
"""Steps come first: a hook may record with a step the key by which another kind is known."""


def line_of(values: Values) -> Line:
    """The event for the values of a line."""
    kind = next((kind for kind in KINDS if kind.KEY in values), None)
    if kind is None:
        return OtherEvent(values)
    if problem := _place_problem(values) or kind.problem(values):
        return OtherEvent(values, problem)
    event = kind.read(values)
    known = event.to_json()
    extra = {key: value for key, value in values.items() if key not in known}
    return replace(event, extra=extra) if extra else event


def parse_line(text: str) -> Line | None:
    """The event for a line of the file; none for one that was cut off when the process died."""
    try:
        values = parse_json(text, FILE)
    except RequestError:
        return None
    return line_of(values) if isinstance(values, dict) else None


def line_text(line: Line) -> str:
    """The event's line, without the line end."""
    return json.dumps(line.to_json())


def read_lines(folder: Path) -> list[Line]:
    """All lines of the metrics in a run's output folder, in order, without those that were cut off.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    rows = (folder / FILE).read_text(encoding="utf-8").splitlines()
    return [line for row in rows if (line := parse_line(row)) is not None]


def of_kind(lines: Iterable[Line], kind: type[E]) -> list[E]:
    """The events of one kind; of all known kinds for `MetricsEvent`."""
    return [line for line in lines if isinstance(line, kind)]


def read_events(folder: Path, kind: type[E]) -> list[E]:
    """The lines of one kind in a run's output folder, in order; raises as `read_lines` does."""
    return of_kind(read_lines(folder), kind)


def _place_problem(values: Values) -> str:
    missing = [key for key in PLACE if key not in values]
    if missing:
        return " and ".join(f"no {key}" for key in missing)
    if not isinstance(values["stage"], str):
        return "no name as stage"
    wrong = [key for key in PLACE[1:] if not is_number(values[key]) or not math.isfinite(values[key])]
    return f"no number as {wrong[0]}" if wrong else ""
