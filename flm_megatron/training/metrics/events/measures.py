"""Lines that tell what was measured of the model between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flm_megatron.training.metrics.events.event import MetricsEvent, Values, is_number, place_of

SET = "val_loss/"
"""What the key of a validation set's loss begins with."""


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
        return cls(*place_of(values), values["val_loss"], by_set)

    @classmethod
    def problem(cls, values: Values) -> str:
        """Losses that are not numbers."""
        wrong = [key for key, value in values.items() if f"{key}/".startswith(SET) and not is_number(value)]
        return f"no number as {wrong[0]}" if wrong else ""

    def own_values(self) -> dict[str, object]:
        """The mean, then each set."""
        return {"val_loss": self.loss, **{SET + name: loss for name, loss in self.by_set.items()}}


@dataclass(frozen=True)
class EvaluationEvent(MetricsEvent):
    """What was measured of the model besides: numbers by name (`bits_per_byte/TEXT`, `TASK/METRIC`), and prompts with
    how the model went on."""

    KEY: ClassVar[str] = "evaluation"

    values: Mapping[str, float]
    completions: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, values: Values) -> EvaluationEvent:
        """The numbers, and the completions by prompt."""
        pairs = ((each["prompt"], each["text"]) for each in values.get("completions") or ())
        return cls(*place_of(values), values["evaluation"], tuple(pairs))

    @classmethod
    def problem(cls, values: Values) -> str:
        """Values that are not numbers, or completions that are not of prompts."""
        found, completions = values["evaluation"], values.get("completions") or []
        if not isinstance(found, Mapping):
            return "no numbers in evaluation"
        wrong = [name for name, number in found.items() if not is_number(number)]
        if wrong:
            return f"no number as {wrong[0]}"
        whole = isinstance(completions, list) and all(
            isinstance(each, Mapping) and isinstance(each.get("prompt"), str) and isinstance(each.get("text"), str)
            for each in completions
        )
        return "" if whole else "no prompts and texts in completions"

    def own_values(self) -> dict[str, object]:
        """The numbers, and the completions if there are any."""
        completions = [{"prompt": prompt, "text": text} for prompt, text in self.completions]
        return {"evaluation": dict(self.values)} | ({"completions": completions} if completions else {})

    def scalars(self) -> dict[str, float]:
        """The numbers."""
        return dict(self.values)


@dataclass(frozen=True)
class GrowthHealthEvent(MetricsEvent):
    """Old and new entries of a grown model after a step: numbers by name for each layer (`layer_000` ...), and for
    embedding and head; docs/growth.md says what they are."""

    KEY: ClassVar[str] = "growth_health"

    parts: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, values: Values) -> GrowthHealthEvent:
        """The numbers of each part."""
        return cls(*place_of(values), values["growth_health"])

    @classmethod
    def problem(cls, values: Values) -> str:
        """Parts that are not mappings to numbers."""
        parts = values["growth_health"]
        if isinstance(parts, Mapping) and all(isinstance(part, Mapping) for part in parts.values()):
            wrong = [name for part in parts.values() for name, number in part.items() if not is_number(number)]
            return f"no number as {wrong[0]}" if wrong else ""
        return "no parts in growth_health"

    def own_values(self) -> dict[str, object]:
        """All parts under one key."""
        return {"growth_health": {name: dict(part) for name, part in self.parts.items()}}
