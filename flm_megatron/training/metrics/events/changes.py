"""Lines that tell how a stage begins or goes on otherwise than before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flm_megatron.errors import RequestError
from flm_megatron.growth.change import DONE, Change
from flm_megatron.growth.record import Certificate
from flm_megatron.training.metrics.events.event import MetricsEvent, Values, is_number, place_of


@dataclass(frozen=True)
class RestartEvent(MetricsEvent):
    """The run continued from a checkpoint inside a stage."""

    KEY: ClassVar[str] = "restart"

    @classmethod
    def read(cls, values: Values) -> RestartEvent:
        """Nothing besides the position."""
        return cls(*place_of(values))

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
        return cls(*place_of(values), *(values["changed"][name] for name in CHANGE))

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
        return cls(*place_of(values), certificate, distances, values.get("change", "growth"))

    @classmethod
    def problem(cls, values: Values) -> str:
        """Neither a certificate nor null, or distances that are not numbers."""
        distances = values.get("layer_distances") or []
        if not isinstance(distances, list) or not all(map(is_number, distances)):
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
