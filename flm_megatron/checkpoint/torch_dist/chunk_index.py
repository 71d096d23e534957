"""The chunks of one tensor, found by region without searching all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from flm_megatron.checkpoint.logical import Region

BUCKETS = 256


@dataclass(frozen=True)
class StoredChunk:
    """A region of a tensor and the record that holds it."""

    region: Region
    file: str
    offset: int
    length: int


class Chunk(Protocol):
    """Whatever holds a region of a tensor."""

    @property
    def region(self) -> Region:
        """The region that it holds."""


T = TypeVar("T", bound=Chunk)


class ChunkIndex(Generic[T]):
    """Chunks in buckets along the first axis (layers, or rows of the vocabulary)."""

    def __init__(self, shape: tuple[int, ...], chunks: Sequence[T]) -> None:
        self.width = -(-shape[0] // BUCKETS) or 1 if shape else 1
        self.buckets: dict[int, list[T]] = defaultdict(list)
        for chunk in chunks:
            for bucket in self._buckets_of(chunk.region):
                self.buckets[bucket].append(chunk)

    def meeting(self, region: Region) -> list[tuple[T, Region]]:
        """Chunks that overlap `region`, each with the overlap."""
        near = {chunk: None for bucket in self._buckets_of(region) for chunk in self.buckets.get(bucket, ())}
        return [(chunk, part) for chunk in near if (part := chunk.region.intersect(region))]

    def _buckets_of(self, region: Region) -> range:
        if not region.sizes:
            return range(1)
        start, size = region.offsets[0], region.sizes[0]
        return range(start // self.width, -(-(start + size) // self.width))
