"""Optimizer state as regions of logical tensors, owned by this process; nothing is gathered."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.regions import flat_regions
from flm_megatron.checkpoint.sharding.placement import Placement
from flm_megatron.engine.optimizer import owned_ranges, parts
from flm_megatron.engine.types import ChainedPart, Optimizer


@dataclass(frozen=True)
class StateSlice:
    """Values `start` to `end` of a local parameter, flat and row-major, with their fp32 master and moments.

    `sharded` if the other data-parallel ranks own other ranges; otherwise they hold the same.
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    sharded: bool
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True)
class StateRegion:
    """A region of the logical tensor of `placement`; its values begin at `start` of a slice."""

    placement: Placement
    region: Region
    start: int

    def values(self, flat: torch.Tensor) -> torch.Tensor:
        """View of a slice's flat master or moment, of shape `region.sizes`."""
        return flat[self.start : self.start + self.region.numel].view(self.region.sizes)


def state_slices(optimizer: Optimizer) -> Iterator[StateSlice]:
    """Optimizer state that this process owns; its moments must exist."""
    for part in parts(optimizer):
        yield from part_slices(part)


def part_slices(part: ChainedPart) -> Iterator[StateSlice]:
    """What one of the optimizers in it owns."""
    for owned in owned_ranges(part):
        flat = [owned.state[key].detach().view(-1) for key in ("param", "exp_avg", "exp_avg_sq")]
        assert all(values.dtype == torch.float32 for values in flat), "optimizer state is kept in fp32"
        count = owned.end - owned.start
        assert flat[0].numel() == count, f"{flat[0].numel()} values for the range {owned.start} to {owned.end}"
        yield StateSlice(owned.parameter, owned.start, owned.end, owned.sharded, *flat)


def state_regions(state: StateSlice, by_parameter: dict[int, list[Placement]]) -> Iterator[StateRegion]:
    """Regions that cover a slice but for padding rows: at most three for each placement of a matrix.

    `by_parameter` is `placements_by_parameter`'s.
    """
    shape = tuple(state.parameter.shape)
    for covered in flat_regions(shape, state.start, state.end):
        for placement in by_parameter[id(state.parameter)]:
            held = covered.intersect(placement.local)
            if held is None:
                continue
            inside = held.within(placement.local)
            layers = len(placement.region.offsets) - len(shape)
            corner = (0,) * layers + inside.offsets
            offsets = tuple(a + b for a, b in zip(placement.region.offsets, corner, strict=True))
            start = sum(o * math.prod(shape[i + 1 :]) for i, o in enumerate(held.offsets)) - state.start
            yield StateRegion(placement, Region(offsets, (1,) * layers + held.sizes), start)


def placements_by_parameter(parts: Iterable[Placement]) -> dict[int, list[Placement]]:
    """Placements by the `id` of their parameter (a gated matrix has two; one of padding rows only has none)."""
    table: dict[int, list[Placement]] = defaultdict(list)
    for placement in parts:
        table[id(placement.parameter)].append(placement)
    return table
