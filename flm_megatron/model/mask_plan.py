"""What growth masks hide, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskedPaths = Literal["each", "once"]
"""Whether each of the modules on a path through a new unit masks it, or the path is masked once."""

DIMENSIONS = ("hidden", "ffn", "heads", "layers")


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

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Those that are masked, of hidden, ffn, heads, layers."""
        return tuple(name for name in DIMENSIONS if getattr(self, name) not in (None, ()))

    def __bool__(self) -> bool:
        return bool(self.dimensions)
