"""What growth masks hide, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskedPaths = Literal["each", "once"]
"""Whether each of the modules on a path through a new unit masks it, or the path is masked once."""


@dataclass(frozen=True)
class MaskPlan:
    """Units from the old size on are masked. None leaves a dimension unmasked.

    `heads` is (old query groups, old query heads per group); `layers` are the indices of copied layers.
    """

    hidden: int | None = None
    ffn: int | None = None
    heads: tuple[int, int] | None = None
    layers: tuple[int, ...] = ()
    paths: MaskedPaths = "once"

    def __bool__(self) -> bool:
        return any(part is not None for part in (self.hidden, self.ffn, self.heads)) or bool(self.layers)
