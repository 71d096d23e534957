"""Masks that open step by step: a function of the stage's step, so nothing else of them need be saved."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from flm_megatron.json_text import JsonObject
from flm_megatron.model.mask_plan import MaskPlan

MaskShape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class OpeningMasks:
    """The masks of one growth, and how they open.

    They open over `steps` steps from the first of stage `stage`, which began them; `done` of these were taken before
    the stage under consideration.
    """

    stage: str
    masks: MaskPlan
    steps: int
    shape: MaskShape = "linear"
    done: int = 0

    def value(self, step: int) -> float:
        """v in [0, 1] for the forward pass after `step` steps of the stage under consideration."""
        if self.done + step >= self.steps:
            return 1.0
        progress = max(self.done + step, 0) / self.steps
        return progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2

    @property
    def left(self) -> int:
        """Steps of the stage under consideration until they are open."""
        return self.steps - self.done

    def grown_by(self, dimensions: Collection[str]) -> tuple[str, ...]:
        """Those of `dimensions` that are masked here."""
        return tuple(name for name in self.masks.dimensions if name in dimensions)

    def after(self, step: int) -> OpeningMasks:
        """The same for the stage that begins after `step` steps of this one."""
        return replace(self, done=self.done + step)

    @classmethod
    def from_json(cls, data: JsonObject) -> OpeningMasks:
        """From the plain data of `dataclasses.asdict`."""
        masks = dict(data["masks"])
        masks["heads"] = tuple(masks["heads"]) if masks["heads"] else None
        masks["layers"] = tuple(masks["layers"])
        return cls(**{**data, "masks": MaskPlan(**masks)})
