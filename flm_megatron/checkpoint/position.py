"""Where a checkpoint stands in its run, as its manifest says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEYS = ("stage", "step", "samples", "tokens", "optimizer_step")
"""In the order in which a manifest has them."""


@dataclass(frozen=True)
class StagePosition:
    """How far a run is: `step` of the stage, samples and tokens of all stages, Adam's step, the stage's name; none is
    what is not known."""

    step: int | None = None
    samples: int | None = None
    tokens: int | None = None
    optimizer_step: int | None = None
    stage: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The entries of a manifest, without those that are not known."""
        known = {key: getattr(self, key) for key in KEYS}
        return {key: value for key, value in known.items() if value is not None}


def recorded_position(manifest: Mapping[str, Any]) -> StagePosition:
    """The position that a manifest records; nothing is known where it says nothing."""
    return StagePosition(**{key: manifest.get(key) for key in KEYS})
