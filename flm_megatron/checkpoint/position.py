"""Where a checkpoint stands in its run, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEYS = ("stage", "step", "samples", "tokens", "optimizer_step")
"""In their order in a manifest."""


@dataclass(frozen=True)
class StagePosition:
    """How far a run is.

    `step` of the stage, samples and tokens of all stages, Adam's step, and the stage's name; none if not known.
    """

    step: int | None = None
    samples: int | None = None
    tokens: int | None = None
    optimizer_step: int | None = None
    stage: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The entries of a manifest, without unknown ones."""
        known = {key: getattr(self, key) for key in KEYS}
        return {key: value for key, value in known.items() if value is not None}


def recorded_position(manifest: Mapping[str, Any]) -> StagePosition:
    """The position that a manifest records, with none for what it does not record."""
    return StagePosition(**{key: manifest.get(key) for key in KEYS})
