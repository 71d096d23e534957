"""Which entries of a grown model a growth added, from its plan: the plan's old ones stay old wherever they lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.growth.grown.axes import Segment, segments_within, tensor_segments
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import parameter_specs


class AddedEntries:
    """Tells old entries of each parameter of the grown model from added ones; those of copies are added."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self._old, self._new = parameter_specs(plan.old), parameter_specs(plan.new)
        self._segments = cache(self._all_segments)

    def regions(self, name: str, region: Region) -> Iterator[tuple[Region, bool]]:
        """`region` of parameter `name`, cut into regions that are wholly added or wholly old: (region, added)."""
        for cut in itertools.product(*segments_within(self._segments(name), region)):
            yield Region(tuple(s.start for s in cut), tuple(s.size for s in cut)), any(map(_added, cut))

    def flags(self, name: str, region: Region) -> torch.Tensor:
        """For each entry of a region whether it was added: bool, of shape `region.sizes`."""
        out = torch.zeros(region.sizes, dtype=torch.bool)
        for part, added in self.regions(name, region):
            out[part.within(region).slices] = added
        return out

    def indices(self, name: str, axis: int) -> list[bool]:
        """For each index along an axis of parameter `name` whether it was added."""
        return [_added(segment) for segment in self._segments(name)[axis] for _ in range(segment.size)]

    def _all_segments(self, name: str) -> list[list[Segment]]:
        return tensor_segments(self.plan, self._old.get(name), self._new[name])


def _added(segment: Segment) -> bool:
    return segment.source is None or segment.copy
