"""What is read of a checkpoint, counted by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region, split_name

STATES = dict(zip(("", *STATE_PREFIXES), ("weights", "masters", "first moments", "second moments"), strict=True))
"""What the prefixes of tensors stand for."""


@dataclass
class Amount:
    """Regions and their bytes."""

    regions: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        """One more region."""
        self.regions += 1
        self.nbytes += nbytes


class Counted(LogicalCheckpoint):
    """`source`, of which `tensors_read` says by name what was read of it."""

    def __init__(self, source: LogicalCheckpoint) -> None:
        self.source = source
        self.manifest, self.tensors = source.manifest, source.tensors
        self.tensors_read: dict[str, Amount] = {}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region`; see `LogicalCheckpoint.read`."""
        values = self.source.read(name, region)
        self.tensors_read.setdefault(name, Amount()).add(values.nbytes)
        return values

    def has_optimizer(self) -> bool:
        """Whether it has masters and moments; raises whatever the source raises."""
        return self.source.has_optimizer()


def by_state(regions: Iterable[tuple[str, Amount]]) -> dict[str, Amount]:
    """Amounts of tensors as those of weights, masters and both moments."""
    states: dict[str, Amount] = {}
    for name, amount in regions:
        state = states.setdefault(STATES[split_name(name)[0]], Amount())
        state.regions += amount.regions
        state.nbytes += amount.nbytes
    return states


def total(amounts: Iterable[Amount]) -> Amount:
    """All of them together."""
    found = list(amounts)
    return Amount(sum(amount.regions for amount in found), sum(amount.nbytes for amount in found))
