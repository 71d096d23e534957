"""Keys and values of the positions that a model has seen, so that generation computes each position once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from flm_megatron.model.teleflm import TeleFLM


class KeyValueCache:
    """What the attention layers of one model chunk have seen: up to `capacity` positions.

    Each forward pass calls `begin` once, then every layer `append`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._start = 0
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, positions: int) -> slice:
        """Open a forward pass over the next `positions` positions; returns where they lie."""
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


@contextmanager
def cached(chunk: TeleFLM, capacity: int) -> Iterator[KeyValueCache]:
    """While the block runs, forward passes of `chunk` go on where the last one ended, one sequence after another.

    The model must be built without sequence parallelism, from this program's own attention. With a cache it gives
    the logits of the last position only.
    """
    from flm_megatron.model.attention.core import CoreAttention

    cache = KeyValueCache(capacity)
    layers = [module for module in chunk.modules() if isinstance(module, CoreAttention)]
    assert layers and not chunk.config.sequence_parallel
    holders: list[TeleFLM | CoreAttention] = [chunk, *layers]
    for holder in holders:
        holder.cache = cache
    try:
        yield cache
    finally:
        for holder in holders:
            holder.cache = None
