"""A random order of n things of which any place can be asked for, without an array of n numbers."""

from __future__ import annotations

import hashlib

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
        """What stands at `place`, both in [0, size)."""
        assert 0 <= place < self.size
        value = self._step(place)
        while value >= self.size:
            value = self._step(value)
        return value

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
