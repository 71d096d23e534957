"""The lines of a run's `metrics.jsonl`: a class for each kind, written and read here alone.

A line is a JSON object. All kinds say where the run stood (`stage`, `step`, `tokens`), and each is known by a key of
its own (`KEY`). Kinds that are not known, which a hook of the user or a later version may have written, are kept as
they are. No torch here: the planner reads these files too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from flm_megatron.errors import RequestError
from flm_megatron.growth.change import DONE, Change
from flm_megatron.growth.record import Certificate
from flm_megatron.json_text import Json, parse_json

FILE = "metrics.jsonl"
PLACE = ("stage", "step", "tokens")
SET = "val_loss/"
"""What the key of a validation set's loss begins with."""
Values = Mapping[str, Json]
E = TypeVar("E", bound="MetricsEvent")


@dataclass(frozen=True)
class MetricsEvent:
    """A line of a known kind: what happened after `step` steps of `stage`, at `tokens` tokens of the run."""

    KEY: ClassVar[str]
    """The key that only lines of this kind have."""

    stage: str
    step: int
    tokens: int
    extra: Values = field(default_factory=dict, kw_only=True)
    """Other keys of the line: metrics of hooks, or fields of a later version."""

    @classmethod
    def read(cls: type[E], values: Values) -> E:
        """The event for a line's values, which have a usable position and `KEY`; `extra` is left empty."""
        raise NotImplementedError

    @classmethod
    def problem(cls, values: Values) -> str:
        """What is wrong with the values of the kind's own keys; empty if nothing is."""
        return ""

    def own_values(self) -> dict[str, object]:
        """The kind's own keys and values, as they are in the line."""
        raise NotImplementedError

    def to_json(self) -> dict[str, object]:
        """The line's values in order."""
        return {key: getattr(self, key) for key in PLACE} | self.own_values() | dict(self.extra)


@dataclass(frozen=True)
class StepEvent(MetricsEvent):
    """A step that was applied. Times are in seconds, memory in GiB, TFLOP/s are model FLOPs.

    `mfu` is none for an unknown device, `skipped_steps` counts the refused steps of the stage so far. A number that
    another program's line lacks is NaN.
    """

    KEY: ClassVar[str] = "loss"

    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    tokens_per_s_per_device: float
    tflops_per_device: float
    mfu: float | None
    peak_memory_gib: float
    eta_s: float
    skipped_steps: int = 0

    @classmethod
    def read(cls, values: Values) -> StepEvent:
        """Its numbers."""
        return cls(*_place(values), **{name: values.get(name, ABSENT.get(name, math.nan)) for name in STEP_NUMBERS})

    @classmethod
    def problem(cls, values: Values) -> str:
        """Fields that are not numbers."""
        given = {name: values[name] for name in STEP_NUMBERS if name in values}
        wrong = [name for name, value in given.items() if not _is_number(value) and (name, value) != ("mfu", None)]
        return f"no number as {wrong[0]}" if wrong else ""

    def own_values(self) -> dict[str, object]:
        """Its numbers."""
        return {name: getattr(self, name) for name in STEP_NUMBERS}


STEP_NUMBERS = tuple(each.name for each in fields(StepEvent) if each.name not in (*PLACE, "extra"))
ABSENT = {"mfu": None, "skipped_steps": 0}


@dataclass(frozen=True)
class RefusedEvent(MetricsEvent):
    """A step that was not applied: why, by which policy, and the names of the samples of its batch."""

    KEY: ClassVar[str] = "refused"

    reason: str
    policy: str
    samples: tuple[str, ...]

    @classmethod
    def read(cls, values: Values) -> RefusedEvent:
        """Reason, policy, samples."""
        return cls(*_place(values), values["refused"], values.get("policy", ""), tuple(values.get("samples") or ()))

    def own_values(self) -> dict[str, object]:
        """The reason is what the line is known by."""
        return {"refused": self.reason, "policy": self.policy, "samples": list(self.samples)}


@dataclass(frozen=True)
class ValidationEvent(MetricsEvent):
    """Mean loss of the validation sets in nats per token, and that of each set by name."""

    KEY: ClassVar[str] = "val_loss"

    loss: float
    by_set: Mapping[str, float]

    @classmethod
    def read(cls, values: Values) -> ValidationEvent:
        """The mean, and the losses under `val_loss/NAME`."""
        by_set = {key.removeprefix(SET): value for key, value in values.items() if key.startswith(SET)}
        return cls(*_place(values), values["val_loss"], by_set)

    @classmethod
    def problem(cls, values: Values) -> str:
        """Losses that are not numbers."""
        wrong = [key for key, value in values.items() if f"{key}/".startswith(SET) and not _is_number(value)]
        return f"no number as {wrong[0]}" if wrong else ""

    def own_values(self) -> dict[str, object]:
        """The mean, then each set."""
        return {"val_loss": self.loss, **{SET + name: loss for name, loss in self.by_set.items()}}


@dataclass(frozen=True)
class RestartEvent(MetricsEvent):
    """The run continued from a checkpoint inside a stage."""

    KEY: ClassVar[str] = "restart"

    @classmethod
    def read(cls, values: Values) -> RestartEvent:
        """Nothing besides the position."""
        return cls(*_place(values))

    def own_values(self) -> dict[str, object]:
        """The key that marks a restart."""
        return {"restart": True}


@dataclass(frozen=True)
class ChangeEvent(MetricsEvent):
    """A setting that changed between the checkpoint and now, with both values as JSON."""

    KEY: ClassVar[str] = "changed"

    what: str
    before: object
    now: object

    @classmethod
    def read(cls, values: Values) -> ChangeEvent:
        """What `changed` holds."""
        return cls(*_place(values), *(values["changed"][name] for name in CHANGE))

    @classmethod
    def problem(cls, values: Values) -> str:
        """`changed` is not a mapping with the three keys."""
        changed = values["changed"]
        lacking = [name for name in CHANGE if not isinstance(changed, Mapping) or name not in changed]
        return f"no {lacking[0]} in changed" if lacking else ""

    def own_values(self) -> dict[str, object]:
        """All three values under one key."""
        return {"changed": {name: getattr(self, name) for name in CHANGE}}


CHANGE = ("what", "before", "now")


@dataclass(frozen=True)
class GrowthEvent(MetricsEvent):
    """The stage began with a growth or a shrinking; `certificate` is its measurement, none if it was not measured.

    `distances` of each old layer from the identity, by `growth.distance_metric`, if the layers to copy were chosen by
    them in this run.
    """

    KEY: ClassVar[str] = "certificate"

    certificate: Certificate | None
    distances: tuple[float, ...] = ()
    change: Change = "growth"

    @classmethod
    def read(cls, values: Values) -> GrowthEvent:
        """The certificate, the distances and which change it was."""
        given = values["certificate"]
        certificate = Certificate.from_json(given) if given else None
        distances = tuple(values.get("layer_distances") or ())
        return cls(*_place(values), certificate, distances, values.get("change", "growth"))

    @classmethod
    def problem(cls, values: Values) -> str:
        """Neither a certificate nor null, or distances that are not numbers."""
        distances = values.get("layer_distances") or []
        if not isinstance(distances, list) or not all(map(_is_number, distances)):
            return "no numbers as layer_distances"
        if values.get("change", "growth") not in DONE:
            return "no change that this program knows"
        try:
            cls.read(values)
        except RequestError:
            return "no certificate that this program knows"
        return ""

    def own_values(self) -> dict[str, object]:
        """The certificate, the distances if there are any, and the change if it was no growth."""
        certificate = self.certificate.to_json() if self.certificate else None
        distances = {"layer_distances": list(self.distances)} if self.distances else {}
        return {"certificate": certificate} | distances | ({"change": self.change} if self.change != "growth" else {})


@dataclass(frozen=True)
class GrowthHealthEvent(MetricsEvent):
    """Old and new entries of a grown model after a step: numbers by name for each layer (`layer_000` ...), and for
    embedding and head; docs/growth.md says what they are."""

    KEY: ClassVar[str] = "growth_health"

    parts: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, values: Values) -> GrowthHealthEvent:
        """The numbers of each part."""
        return cls(*_place(values), values["growth_health"])

    @classmethod
    def problem(cls, values: Values) -> str:
        """Parts that are not mappings to numbers."""
        parts = values["growth_health"]
        if isinstance(parts, Mapping) and all(isinstance(part, Mapping) for part in parts.values()):
            wrong = [name for part in parts.values() for name, number in part.items() if not _is_number(number)]
            return f"no number as {wrong[0]}" if wrong else ""
        return "no parts in growth_health"

    def own_values(self) -> dict[str, object]:
        """All parts under one key."""
        return {"growth_health": {name: dict(part) for name, part in self.parts.items()}}


@dataclass(frozen=True)
class NewLevelEvent(MetricsEvent):
    """The spike guard accepted persistently high values as a new level; `level` is its message."""

    KEY: ClassVar[str] = "new_level"

    level: str

    @classmethod
    def read(cls, values: Values) -> NewLevelEvent:
        """The message."""
        return cls(*_place(values), values["new_level"])

    def own_values(self) -> dict[str, object]:
        """The message."""
        return {"new_level": self.level}


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


Line = MetricsEvent | OtherEvent
KINDS: tuple[type[MetricsEvent], ...] = (
    StepEvent, RefusedEvent, ValidationEvent, RestartEvent, ChangeEvent, GrowthEvent, NewLevelEvent,
    GrowthHealthEvent,
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
    return replace(event, extra={key: value for key, value in values.items() if key not in known})


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


def _place(values: Values) -> tuple[str, int, int]:
    return values["stage"], values["step"], values["tokens"]


def _place_problem(values: Values) -> str:
    missing = [key for key in PLACE if key not in values]
    if missing:
        return " and ".join(f"no {key}" for key in missing)
    if not isinstance(values["stage"], str):
        return "no name as stage"
    wrong = [key for key in PLACE[1:] if not _is_number(values[key])]
    return f"no number as {wrong[0]}" if wrong else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
