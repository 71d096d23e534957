"""A random order of n things whose elements are computed one by one, without an array of n numbers."""

from __future__ import annotations

import hashlib

import numpy

ROUNDS = 6
MASK = 2**64 - 1


class Permutation:
    """A pseudo-random permutation of range(size), fixed by `size` and `key`.

    A Feistel network over the next even number of bits, walked along its cycle until it lands inside the range
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, key: str) -> None:
        """`size` at least 1; any text as `key`."""
        assert size > 0
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "big") for r in range(ROUNDS)]

    def __getitem__(self, place: int) -> int:
        """The element at `place`, both in [0, size)."""
        assert 0 <= place < self.size
        value = self._step(place)
        while value >= self.size:
            value = self._step(value)
        return value

    def places(self, start: int, stop: int) -> numpy.ndarray:
        """The elements at places `start` to `stop`, [stop - start] int64, computed together."""
        values = numpy.arange(start, stop, dtype=numpy.uint64)
        outside = numpy.arange(len(values))
        while len(outside):
            values[outside] = self._steps(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(numpy.int64)

    def _steps(self, values: numpy.ndarray) -> numpy.ndarray:
        """`_step` of every value, uint64."""
        half, low = numpy.uint64(self._half), numpy.uint64((1 << self._half) - 1)
        left, right = values >> half, values & low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ numpy.uint64(key)) & low)
        return left << half | right

    def _step(self, value: int) -> int:
        low = (1 << self._half) - 1
        left, right = value >> self._half, value & low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        return left << self._half | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def _mixed(values: numpy.ndarray) -> numpy.ndarray:
    """`_mix` of every value, uint64, which wraps around by itself."""
    values = (values ^ values >> numpy.uint64(30)) * numpy.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> numpy.uint64(27)) * numpy.uint64(0x94D049BB133111EB)
    return values ^ values >> numpy.uint64(31)
