"""A region of a tensor of the smaller model, gathered from regions of the larger one's in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.regions import slice_axis
from flm_megatron.growth.shrink.plan import ShrinkPlan
from flm_megatron.model.parameters import Axis, Unit, parameter_specs

BLOCK = 2**21
"""Most values that are read at a time, 8 MiB in fp32."""
ROWS_REMEMBERED = 32
BY_LAYER = (Unit.FFN, Unit.HEAD)
"""Units of which every layer keeps its own."""


@dataclass(frozen=True)
class Gathered:
    """A region of the smaller model's tensor: of the larger one's the region around it, and the places in that along
    each axis (none for all of them). It lies in one layer, `layer` of the smaller model, if its tensor has layers."""

    region: Region
    source: Region
    places: tuple[np.ndarray | None, ...]
    layer: int | None

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """The region's values out of those of `source`."""
        for axis, places in enumerate(self.places):
            if places is not None:
                values = values.index_select(axis, torch.from_numpy(places).to(values.device))
        return values


class Gather:
    """Says which old values each region of every tensor of one shrinking has."""

    def __init__(self, plan: ShrinkPlan) -> None:
        self.plan = plan
        self.specs, self.old_specs = parameter_specs(plan.new), parameter_specs(plan.old)
        self._along = lru_cache(ROWS_REMEMBERED)(self._all_indices)

    def regions(self, name: str, region: Region) -> Iterator[Gathered]:
        """`region` of parameter `name` cut into such of one layer whose sources are of at most BLOCK values (or one
        value), in row-major order."""
        if not region.numel:
            return
        if not self.specs[name].stacked:
            yield from self._split(name, region, None)
            return
        for place in range(region.sizes[0]):
            one = slice_axis(region, 0, place, 1)
            yield from self._split(name, one, one.offsets[0])

    def _split(self, name: str, region: Region, layer: int | None) -> Iterator[Gathered]:
        """Halves a region along its first axis that has more than one index until its source is small enough."""
        axes = zip(self.old_specs[name].axes, region.slices, strict=True)
        indices = [self._along(axis, layer if axis.unit in BY_LAYER else None)[within] for axis, within in axes]
        source = Region(tuple(int(i[0]) for i in indices), tuple(int(i[-1] - i[0]) + 1 for i in indices))
        if source.numel > BLOCK and region.numel > 1:
            axis = next(axis for axis, size in enumerate(region.sizes) if size > 1)
            half = region.sizes[axis] // 2
            yield from self._split(name, slice_axis(region, axis, 0, half), layer)
            yield from self._split(name, slice_axis(region, axis, half, region.sizes[axis] - half), layer)
            return
        places = tuple(None if len(i) == size else i - i[0] for i, size in zip(indices, source.sizes, strict=True))
        yield Gathered(region, source, places, layer)

    def _all_indices(self, axis: Axis, layer: int | None) -> np.ndarray:
        """The old index of every index along an axis, in a layer of the smaller model."""
        plan = self.plan
        if axis.unit is Unit.LAYER:
            return plan.layers.indices(0)
        if axis.unit is Unit.HIDDEN:
            return plan.hidden.indices(0)
        if layer is None:
            return np.arange(axis.size)
        if axis.unit is Unit.FFN:
            return _in_bands(axis, plan.ffn.indices(layer))
        return _of_heads(axis, plan.heads.indices(layer), plan.old.num_attention_heads, plan.old.kv_channels)


def _in_bands(axis: Axis, units: np.ndarray) -> np.ndarray:
    """The kept units in every band."""
    starts = np.cumsum([0, *(band.size for band in axis.bands[:-1])])
    return (starts[:, None] + units).ravel()


def _of_heads(axis: Axis, heads: np.ndarray, num_heads: int, channels: int) -> np.ndarray:
    """Channels of the kept query heads; where an axis has them, of the keys and values of their groups."""
    per_group = num_heads // axis.groups
    found = []
    for group in np.unique(heads // per_group):
        own = heads[heads // per_group == group] - group * per_group
        start = group * axis.group_size
        for band in axis.bands:
            of_band = np.arange(band.size)
            if band.name not in ("key", "value"):
                of_band = of_band.reshape(per_group, channels)[own].ravel()
            found.append(start + of_band)
            start += band.size
    return np.concatenate(found)


def gather(
    gathering: Gather, name: str, region: Region, dtype: torch.dtype, read: Callable[[Gathered], torch.Tensor]
) -> torch.Tensor:
    """The values of a region in `dtype`, of which `read` gives those of each part."""
    out = torch.empty(0, dtype=dtype)
    for part in gathering.regions(name, region):
        values = read(part)
        if part.region == region:
            return values.to(dtype)  # one part is all of it: no copy
        if not out.numel():
            out = torch.empty(region.sizes, dtype=dtype)
        out[part.region.within(region).slices] = values
    return out.view(region.sizes)
