"""How processes that work together exchange messages: over a group of their own, or over the store of their world.

Tools use a group. Beside training a group will not do: gloo connects every rank with every other, so a group of the
world costs N - 1 sockets a rank. The store connects each rank with one server already. Messages over it are small and
rare: a few kilobytes from each rank per save, and the outcome back.
"""

from __future__ import annotations

import os
import pickle
import time
from datetime import timedelta
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from flm_megatron.errors import FlmError

SLOWEST_WORK = timedelta(hours=6)
"""How much longer than the others a rank may work, such as to write 16 GiB to a slow disk."""
WINDOW = 64
"""Ranks whose values rank 0 requests at once."""
VALUE_BYTES = 2**20
"""Largest entry of a store; longer values are split."""
POLLS_PER_S = 5000
"""Polls of the store by all ranks together: about a tenth of what it can answer."""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.2

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks of `group` (of the world without one), on each of them."""
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast(value: T) -> T:
    """What rank 0 of the world gives, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class Channel(Protocol):
    """Between `size` processes, of which this is number `rank`. All of them must call the same methods in the same
    order."""

    rank: int
    size: int

    def gather(self, value: T) -> list[T]:
        """The values of all ranks on rank 0, nothing elsewhere. Raises FlmError on rank 0 if one is missing."""

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on all ranks. Raises FlmError if it does not arrive."""


class GroupChannel:
    """Over the group of the world."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: T) -> list[T]:
        """As a Channel. Raises what the group raises."""
        values = [value] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def broadcast(self, value: T) -> T:
        """As a Channel. Raises what the group raises."""
        return broadcast(value)


class StoreChannel:
    """Over a store that all processes reach, from any thread.

    No call holds the store's client for long: a waiting rank polls, less often the longer it waits and the more ranks
    there are. Entries are deleted once they were read.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, patience: timedelta = SLOWEST_WORK) -> None:
        """`store` is for these processes and this purpose alone; rank 0 waits `patience` for the last of the ranks."""
        self._store, self.rank, self.size = store, rank, size
        self._patience_s = patience.total_seconds()
        self._pause_s = max(SHORTEST_PAUSE_S, size / POLLS_PER_S if rank else 0)
        self._round = 0
        self._told: list[str] = []

    def gather(self, value: T) -> list[T]:
        """As a Channel."""
        self._round += 1
        if self.rank:
            self._put(self._key(self.rank), value)
            return []
        values = [value]
        deadline = time.monotonic() + self._patience_s
        for first in range(1, self.size, WINDOW):
            ranks = range(first, min(first + WINDOW, self.size))
            keys = [self._key(rank) for rank in ranks]
            if not self._come(keys, deadline):
                missing = [rank for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])]
                raise FlmError(f"nothing came from {_named(missing)} for {self._patience_s:g} s")
            values += [pickle.loads(self._take(key)) for key in keys]
        for key in self._told:  # all ranks have gone on from there
            self._forget(key)
        self._told.clear()
        return values

    def broadcast(self, value: T) -> T:
        """As a Channel."""
        self._round += 1
        key = self._key(0)
        if self.rank == 0:
            self._put(key, value)
            self._told.append(key)
            return value
        # Rank 0 may have begun to wait for others later than this one for it.
        if not self._come([key], time.monotonic() + 2 * self._patience_s):
            raise FlmError(f"nothing came from rank 0 for {2 * self._patience_s:g} s")
        return pickle.loads(self._read(key))

    def _key(self, rank: int) -> str:
        return f"{self._round}/{rank}"

    def _come(self, keys: list[str], deadline: float) -> bool:
        """Wait for all of `keys`; returns whether they came in time."""
        began = time.monotonic()
        while not self._store.check(keys):
            now = time.monotonic()
            if now > deadline:
                return False
            time.sleep(max(self._pause_s, min(LONGEST_PAUSE_S, (now - began) / 10)))
        return True

    def _put(self, key: str, value: object) -> None:
        data = pickle.dumps(value)
        parts = [data[start : start + VALUE_BYTES] for start in range(0, len(data), VALUE_BYTES)]
        for number, part in enumerate(parts[1:], 1):
            self._set(f"{key}/{number}", part)
        self._set(key, len(parts).to_bytes(4, "little") + parts[0])  # last: it says that the value is there

    def _set(self, name: str, data: bytes) -> None:
        self._store.set(name, data)  # type: ignore[arg-type]  # takes bytes as they are

    def _read(self, key: str) -> bytes:
        head = self._store.get(key)
        parts = [self._store.get(name) for name in _parts(key, head)]
        return b"".join([head[4:], *parts])

    def _forget(self, key: str) -> None:
        for name in (*_parts(key, self._store.get(key)), key):
            self._store.delete_key(name)

    def _take(self, key: str) -> bytes:
        data = self._read(key)
        self._forget(key)
        return data


def _parts(key: str, head: bytes) -> list[str]:
    """The keys of a value's further entries."""
    return [f"{key}/{number}" for number in range(1, int.from_bytes(head[:4], "little"))]


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


_channels: WeakKeyDictionary[dist.ProcessGroup, dict[str, StoreChannel]] = WeakKeyDictionary()


def world_channel(purpose: str) -> StoreChannel:
    """The world's channel for one purpose, over a store of its own, made once. All ranks call, in their main
    threads."""
    world = dist.group.WORLD
    assert world is not None, "there is no world"
    channels = _channels.setdefault(world, {})
    if purpose not in channels:
        agreed = broadcast(os.urandom(8).hex())  # a launcher's store may hold entries of an earlier start
        store = dist.PrefixStore(f"{purpose}/{agreed}", _get_default_store())
        channels[purpose] = StoreChannel(store, dist.get_rank(), dist.get_world_size(), SLOWEST_WORK)
    return channels[purpose]
