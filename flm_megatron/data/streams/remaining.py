"""Which of n things are left when many of them, in any order, are taken: the k-th one left, from one bit each."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy

BLOCK = 65536


class Remaining:
    """Numbers of range(size) that are not among `taken`, in order."""

    def __init__(self, size: int, taken: Iterable[numpy.ndarray]) -> None:
        """`taken` gives numbers in arrays, of any lengths."""
        left = numpy.zeros(-(-size // BLOCK) * BLOCK, dtype=bool)
        left[:size] = True
        for numbers in taken:
            left[numbers] = False
        counts = left.reshape(-1, BLOCK).sum(axis=1)
        self._before = numpy.concatenate([[0], numpy.cumsum(counts)])
        self._bits = numpy.packbits(left).reshape(-1, BLOCK // 8)
        self._block = lru_cache(maxsize=4)(self._numbers)

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, index: int) -> int:
        """The number that has `index` others before it."""
        assert 0 <= index < len(self)
        block = int(numpy.searchsorted(self._before, index, side="right")) - 1
        return int(self._block(block)[index - self._before[block]])

    def _numbers(self, block: int) -> numpy.ndarray:
        return numpy.flatnonzero(numpy.unpackbits(self._bits[block])) + block * BLOCK
