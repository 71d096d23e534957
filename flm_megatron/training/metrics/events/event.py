"""What all lines of `metrics.jsonl` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from flm_megatron.json_text import Json

PLACE = ("stage", "step", "tokens")
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

    def scalars(self) -> dict[str, float]:
        """The line's numbers that are drawn over steps, by name."""
        return floats_of(self.to_json())


def place_of(values: Values) -> tuple[str, int, int]:
    """Stage, step and tokens of a line that has them."""
    return values["stage"], values["step"], values["tokens"]


def is_number(value: object) -> bool:
    """Whether a value of a line is a number, which in JSON true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def floats_of(values: Mapping[str, object]) -> dict[str, float]:
    """The entries that are floats."""
    return {name: value for name, value in values.items() if isinstance(value, float)}
