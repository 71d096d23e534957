"""Keys and values of past positions, so that generation computes each position once."""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of one model chunk's attention layers, for up to `capacity` positions.

    Each forward pass calls `begin` once, then every layer `append`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._start = 0
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, positions: int) -> slice:
        """Start a forward pass over the next `positions` positions; returns their indices."""
        assert self.length + positions <= self.capacity, "the cache was made for fewer positions"
        self._start, self.length = self.length, self.length + positions
        return slice(self._start, self.length)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [new positions, batch, groups, channels]; returns all of them so far."""
        if layer not in self._stored:
            shape = (self.capacity, *key.shape[1:])
            self._stored[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self._stored[layer]
        keys[self._start : self.length] = key
        values[self._start : self.length] = value
        return keys[: self.length], values[: self.length]
