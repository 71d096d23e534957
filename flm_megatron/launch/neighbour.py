"""Whether the process of the previous rank is alive, which its kernel answers even while the process is busy.

Every rank listens on a port and publishes it in the store. The kernel accepts connections as long as the process lives,
refuses them when it has ended, and does not answer when its host is down.
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
    """The methods of torch's stores that are used."""

    def set(self, key: str, value: str) -> None:
        """Write a value under a key."""

    def get(self, key: str) -> bytes:
        """Read the value of a key; waits until it is written."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are written."""


class Neighbour:
    """A rank's port, and that of the previous rank (of the last one for the first)."""

    def __init__(self, store: Store, key: Callable[[str], str], rank: int, size: int) -> None:
        """Listen, and publish the address below `key` of the store. Raises RequestError without an address."""
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
        """Announce that this rank ends in order, so that the next one does not report it. Before `close`."""
        self.store.set(self.key(f"left/{self.own}"), "")

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()

    def _clear(self) -> None:
        """Accept and close the connections of the rank that checks this one, before the kernel's queue is full."""
        with suppress(BlockingIOError):
            while True:
                self.socket.accept()[0].close()
