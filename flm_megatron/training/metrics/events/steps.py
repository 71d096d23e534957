"""Lines that tell of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from flm_megatron.training.metrics.events.event import PLACE, MetricsEvent, Values, is_number, place_of


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
        return cls(*place_of(values), **{name: values.get(name, ABSENT.get(name, math.nan)) for name in STEP_NUMBERS})

    @classmethod
    def problem(cls, values: Values) -> str:
        """Fields that are not numbers."""
        given = {name: values[name] for name in STEP_NUMBERS if name in values}
        wrong = [name for name, value in given.items() if not is_number(value) and (name, value) != ("mfu", None)]
        return f"no number as {wrong[0]}" if wrong else ""

    def own_values(self) -> dict[str, object]:
        """Its numbers."""
        return {name: getattr(self, name) for name in STEP_NUMBERS}


MASK = "growth_mask"
"""What is recorded with a step whose growth masks are not open yet: the value of those that are least open."""
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
        return cls(*place_of(values), values["refused"], values.get("policy", ""), tuple(values.get("samples") or ()))

    def own_values(self) -> dict[str, object]:
        """The reason is what the line is known by."""
        return {"refused": self.reason, "policy": self.policy, "samples": list(self.samples)}


@dataclass(frozen=True)
class NewLevelEvent(MetricsEvent):
    """The spike guard accepted persistently high values as a new level; `level` is its message."""

    KEY: ClassVar[str] = "new_level"

    level: str

    @classmethod
    def read(cls, values: Values) -> NewLevelEvent:
        """The message."""
        return cls(*place_of(values), values["new_level"])

    def own_values(self) -> dict[str, object]:
        """The message."""
        return {"new_level": self.level}


@dataclass(frozen=True)
class SaveEvent(MetricsEvent):
    """A checkpoint of this step is whole on the disk, at `path` below the output folder."""

    KEY: ClassVar[str] = "saved"

    path: str

    @classmethod
    def read(cls, values: Values) -> SaveEvent:
        """The path."""
        return cls(*place_of(values), values["saved"])

    def own_values(self) -> dict[str, object]:
        """The path."""
        return {"saved": self.path}
