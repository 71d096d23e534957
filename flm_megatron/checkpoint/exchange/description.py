"""What one rank holds and wants, as it is told to the other ranks."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flm_megatron.checkpoint.logical import Region

Piece = tuple[str, Region]
"""Name of a logical tensor, and a region of it."""
Held = tuple[str, Region, torch.Tensor]
"""A piece, and the memory that holds its values, of shape `region.sizes`."""


@dataclass(frozen=True)
class Description:
    """What a rank holds, the dtype of each tensor of that, and the groups of pieces that it wants.

    All pieces of a group arrive in the same round.
    """

    held: Sequence[Piece]
    dtypes: Mapping[str, torch.dtype]
    wanted: Sequence[Sequence[Piece]]

    def packed(self) -> bytes:
        """It in few bytes: names once, regions as numbers of 64 bits, compressed."""
        pieces = [*self.held, *(piece for group in self.wanted for piece in group)]
        names = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in pieces))}
        axes = {name: len(region.sizes) for name, region in pieces}
        numbers = np.array([n for name, r in pieces for n in (names[name], *r.offsets, *r.sizes)], np.int64)
        groups = np.array([len(group) for group in self.wanted], np.int64)
        table = ([(name, axes[name]) for name in names], dict(self.dtypes), len(self.held))
        return zlib.compress(pickle.dumps((table, groups.tobytes(), numbers.tobytes())), 1)

    @classmethod
    def unpacked(cls, data: bytes) -> Description:
        """The description that `packed` packed."""
        (names, dtypes, count), groups, numbers = pickle.loads(zlib.decompress(data))
        pieces = iter(_pieces(names, np.frombuffer(numbers, np.int64).tolist()))
        held = [next(pieces) for _ in range(count)]
        sizes = np.frombuffer(groups, np.int64).tolist()
        return cls(held, dtypes, [[next(pieces) for _ in range(size)] for size in sizes])


def described(held: Iterable[Held], wanted: Iterable[Sequence[Piece]]) -> Description:
    """The description of a rank that holds and wants this; what is empty is not wanted."""
    pieces, dtypes = [], {}
    for name, region, tensor in held:
        assert tensor.shape == region.sizes, f"{name}: {tuple(tensor.shape)} for a region of {region.sizes}"
        pieces.append((name, region))
        dtypes[name] = tensor.dtype
    groups = [list(group) for group in wanted]
    assert all(region.numel for group in groups for _, region in group), "nothing would arrive for it"
    return Description(pieces, dtypes, groups)


def _pieces(names: Sequence[tuple[str, int]], numbers: Sequence[int]) -> Iterator[Piece]:
    at = 0
    while at < len(numbers):
        name, axes = names[numbers[at]]
        middle, end = at + 1 + axes, at + 1 + 2 * axes
        yield name, Region(tuple(numbers[at + 1 : middle]), tuple(numbers[middle:end]))
        at = end
