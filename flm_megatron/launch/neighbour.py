"""Whether the process of the rank before this one is there, which its kernel tells although the process is busy.

Every rank listens on a port and says in the store where. A connection is made by the kernel as long as the process
lives, refused when it has ended, and not answered when its host is down.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from flm_megatron.distributed.addresses import listening, own_address

ANSWER_S = 3.0
BACKLOG = 128


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None:
        """Write a value under a key."""

    def get(self, key: str) -> bytes:
        """Read the value of a key; waits until it is written."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are written."""


class Neighbour:
    """A rank's port, and that of the rank before it (of the last one for the first)."""

    def __init__(self, store: Store, key: Callable[[str], str], rank: int, size: int) -> None:
        """Listen, and say where, below `key` of the store. Raises RequestError without an address."""
        address = own_address()
        self.socket = listening(address, BACKLOG)
        self.socket.setblocking(False)
        self.store, self.key, self.own, self.rank = store, key, rank, (rank - 1) % size
        store.set(key(f"port/{rank}"), json.dumps([address, self.socket.getsockname()[1]]))

    def gone(self) -> bool:
        """Whether the neighbour's process has ended without leaving in order, or its host does not answer."""
        self._clear()
        if self.rank == self.own:
            return False
        address, port = json.loads(self.store.get(self.key(f"port/{self.rank}")))
        try:
            socket.create_connection((address, port), ANSWER_S).close()
        except OSError:
            return not self.store.check([self.key(f"left/{self.rank}")])
        return False

    def leave(self) -> None:
        """Say that this rank ends in order, so that the one after it does not miss it. Before `close`."""
        self.store.set(self.key(f"left/{self.own}"), "")

    def close(self) -> None:
        """Listen no longer."""
        self.socket.close()

    def _clear(self) -> None:
        """Let go of the connections of the rank that looked here, before the kernel takes no more."""
        with suppress(BlockingIOError):
            while True:
                self.socket.accept()[0].close()
