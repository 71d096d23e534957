"""What one rank holds and wants, as it is told to the other ranks."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flm_megatron.checkpoint.logical import Region

NamedRegion = tuple[str, Region]
"""Name of a logical tensor, and a region of it."""
Held = tuple[str, Region, torch.Tensor]
"""A named region, and the memory that holds its values, of shape `region.sizes`."""


@dataclass(frozen=True)
class Description:
    """What a rank holds, the dtype of each tensor of that, and the groups of regions that it wants.

    All regions of a group arrive in the same round.
    """

    held: Sequence[NamedRegion]
    dtypes: Mapping[str, torch.dtype]
    wanted: Sequence[Sequence[NamedRegion]]

    def packed(self) -> bytes:
        """It in few bytes: names once, regions as numbers of 64 bits, compressed."""
        regions = [*self.held, *(each for group in self.wanted for each in group)]
        names = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in regions))}
        axes = {name: len(region.sizes) for name, region in regions}
        numbers = np.array([n for name, r in regions for n in (names[name], *r.offsets, *r.sizes)], np.int64)
        groups = np.array([len(group) for group in self.wanted], np.int64)
        table = ([(name, axes[name]) for name in names], dict(self.dtypes), len(self.held))
        return zlib.compress(pickle.dumps((table, groups.tobytes(), numbers.tobytes())), 1)

    @classmethod
    def unpacked(cls, data: bytes) -> Description:
        """The description that `packed` packed."""
        (names, dtypes, count), groups, numbers = pickle.loads(zlib.decompress(data))
        regions = iter(_named_regions(names, np.frombuffer(numbers, np.int64).tolist()))
        held = [next(regions) for _ in range(count)]
        sizes = np.frombuffer(groups, np.int64).tolist()
        return cls(held, dtypes, [[next(regions) for _ in range(size)] for size in sizes])


def described(held: Iterable[Held], wanted: Iterable[Sequence[NamedRegion]]) -> Description:
    """The description of a rank that holds and wants this; what is empty is not wanted."""
    regions, dtypes = [], {}
    for name, region, tensor in held:
        assert tensor.shape == region.sizes, f"{name}: {tuple(tensor.shape)} for a region of {region.sizes}"
        regions.append((name, region))
        dtypes[name] = tensor.dtype
    groups = [list(group) for group in wanted]
    assert all(region.numel for group in groups for _, region in group), "nothing would arrive for it"
    return Description(regions, dtypes, groups)


def _named_regions(names: Sequence[tuple[str, int]], numbers: Sequence[int]) -> Iterator[NamedRegion]:
    at = 0
    while at < len(numbers):
        name, axes = names[numbers[at]]
        middle, end = at + 1 + axes, at + 1 + 2 * axes
        yield name, Region(tuple(numbers[at + 1 : middle]), tuple(numbers[middle:end]))
        at = end
