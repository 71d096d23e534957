"""One axis of a logical tensor: what it counts, the bands it is laid out in, and how tensor parallelism cuts it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Vocabulary rounded up to a multiple of 128 times the tensor-parallel size, so that it splits evenly."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


class Unit(Enum):
    """What an axis counts; the value is the word for it in error messages about cuts."""

    LAYER = "layers"
    VOCABULARY = "tokens"
    POSITION = "positions"
    HIDDEN = "hidden channels"
    FFN = "feed-forward units"
    HEAD = "query groups"
    """Channels of all heads, ordered by query group."""
    HEAD_DIM = "channels of a head"
    ADAPTER_RANK = "ranks of an adapter"


class Cut(Enum):
    """How tensor parallelism divides an axis over T ranks."""

    WHOLE = "whole"
    """Not cut: every rank has all of it."""
    BANDS = "bands"
    """Every band evenly: a rank has 1/T of each band, one after the other."""
    GROUPS = "groups"
    """Between groups: a rank has 1/T of the groups, whole."""
    PADDED = "padded"
    """Evenly, after padding at the end has made it divisible; the padding is part of no shard."""


Side = Literal["out", "in"]
"""Whether the axis counts a matrix's outputs or its inputs."""

BandName = Literal["", "gate", "up", "query", "key", "value"]


@dataclass(frozen=True)
class Band:
    """`size` neighbouring indices of an axis that belong together; named where an axis has several kinds."""

    size: int
    name: BandName = ""


@dataclass(frozen=True)
class Axis:
    """One axis of a logical tensor.

    It consists of `groups` repetitions of `bands`: the rows of the query-key-value matrix are, in each query group,
    the channels of its queries, of its key and of its value; the rows of a gated first feed-forward matrix are the
    bands gate and up, once; most axes are one band. A new group or the new indices of a band come after the old ones
    when a model grows. `side` is none where the values along the axis only scale or shift what they meet (norms).
    """

    unit: Unit
    bands: tuple[Band, ...]
    groups: int = 1
    side: Side | None = None
    cut: Cut = Cut.WHOLE

    def __post_init__(self) -> None:
        assert self.cut is not Cut.BANDS or self.groups == 1, "bands that repeat are cut between their groups"

    @property
    def group_size(self) -> int:
        """Indices of one group."""
        return sum(band.size for band in self.bands)

    @property
    def size(self) -> int:
        """All indices."""
        return self.groups * self.group_size

    def padded_size(self, tensor: int) -> int:
        """Indices with the padding that a cut over `tensor` ranks needs."""
        return padded_vocab_size(self.size, tensor) if self.cut is Cut.PADDED else self.size

    def indivisible(self, tensor: int) -> int | None:
        """The number of units that cannot be split evenly over `tensor` ranks; none if it can, or need not."""
        counts = {Cut.BANDS: [band.size for band in self.bands], Cut.GROUPS: [self.groups]}.get(self.cut, [])
        return next((count for count in counts if count % tensor), None)

    def shards(self, tensor: int, rank: int, padded: int | None = None) -> list[tuple[int, int]]:
        """(first index, number of indices) of what tensor rank `rank` of `tensor` holds, in its own order.

        Where the cut pads, `padded` is the size with padding (this program's own if none); a rank whose shard is all
        padding holds 0 indices.
        """
        if self.cut is Cut.WHOLE:
            return [(0, self.size)]
        if self.cut is Cut.BANDS:
            return self._band_shards(tensor, rank)
        size = padded if padded and self.cut is Cut.PADDED else self.padded_size(tensor)
        shard_size = size // tensor
        first = min(rank * shard_size, self.size)
        return [(first, min(shard_size, self.size - first))]

    def _band_shards(self, tensor: int, rank: int) -> list[tuple[int, int]]:
        shards, start = [], 0
        for band in self.bands:
            shard_size = band.size // tensor
            shards.append((start + rank * shard_size, shard_size))
            start += band.size
        return shards
