"""Whether the process of the previous rank is alive, which its kernel answers even while the process is busy.

Every rank listens on a port and publishes it in the store; the next rank holds a connection to it. The kernels keep the
connection up: it ends with the process, and breaks when the host does not answer. Then a new one is tried, which is
refused when the process has ended, and not answered when its host is down.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from flm_megatron.distributed.addresses import listening, own_address

ANSWER_S = 3.0
PATIENCE_S = 10.0
"""How long a host that has stopped answering is tried again."""
BACKLOG = 128
KEEPALIVE = {
    socket.TCP_KEEPIDLE: 3,  # seconds of silence before the kernel probes
    socket.TCP_KEEPINTVL: 1,
    socket.TCP_KEEPCNT: 5,
}


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
        self._connection: socket.socket | None = None
        self._visitor: socket.socket | None = None
        self._reached = False
        self._unanswered_since: float | None = None
        store.set(key(f"port/{rank}"), json.dumps([address, self.socket.getsockname()[1]]))

    def gone(self, at_once: bool = False) -> bool:
        """Whether the neighbour's process has ended unannounced, or its host has not answered for PATIENCE_S seconds.

        With `at_once` a single try decides, and only an end in order counts as announced. Without it, a rank that was
        never reached (behind a firewall) is not reported.
        """
        self._receive()
        if self.rank == self.own or (self._connected() and not at_once):
            return False
        now = time.monotonic()
        try:
            self._connect()
        except ConnectionRefusedError:
            ended = True
        except OSError:
            self._unanswered_since = self._unanswered_since or now
            ended = at_once or now - self._unanswered_since >= PATIENCE_S
        else:
            self._reached, self._unanswered_since = True, None
            return False
        return ended and (at_once or self._reached) and not self._left(in_order=at_once)

    def lost(self) -> bool:
        """Whether the connection to the neighbour is lost, as far as this host's kernel knows."""
        return self._reached and not self._connected()

    def leave(self, in_order: bool) -> None:
        """Announce that this rank ends, so that the next one does not report it. Before `close`."""
        self.store.set(self.key(f"left/{self.own}"), json.dumps(in_order))

    def close(self) -> None:
        """Stop listening."""
        for each in (self.socket, self._connection, self._visitor):
            if each is not None:
                each.close()

    def _connected(self) -> bool:
        if self._connection is None:
            return False
        try:
            return self._connection.recv(1) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _left(self, in_order: bool) -> bool:
        """Whether the neighbour has announced its end; if `in_order`, an end without an error."""
        key = self.key(f"left/{self.rank}")
        return self.store.check([key]) and (not in_order or json.loads(self.store.get(key)) is True)

    def _connect(self) -> None:
        """Replace the connection by a new one. Raises OSError."""
        address, port = json.loads(self.store.get(self.key(f"port/{self.rank}")))
        made = socket.create_connection((address, port), ANSWER_S)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            made.setsockopt(socket.IPPROTO_TCP, option, value)
        if self._connection is not None:
            self._connection.close()
        self._connection = made

    def _receive(self) -> None:
        """Accept the newest connection of the rank that checks this one, before the kernel's queue is full."""
        with suppress(BlockingIOError):
            while True:
                made = self.socket.accept()[0]
                if self._visitor is not None:
                    self._visitor.close()
                self._visitor = made
