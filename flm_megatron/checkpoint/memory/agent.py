"""The host agent: one process per host that holds copies of the training state and outlives the ranks.

The first rank of a host starts it (`start_agent`). Ranks of its own host talk to it through a Unix socket in Linux's
abstract name space, which no file names and only the same user may use; agents and ranks of other hosts through TCP,
with a token. It ends when it is told to, when the launcher that started the ranks is gone, or when nobody has spoken
to it for IDLE_S. Its memory is anonymous and goes with it, even when it is killed.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from flm_megatron.checkpoint.memory.blobs import NONE, Blob, Blobs, Generation
from flm_megatron.checkpoint.memory.client import Endpoint, RemoteAgent
from flm_megatron.checkpoint.memory.wire import (
    BLOCK,
    SILENCE_S,
    checksums,
    demand_proof,
    receive_data,
    receive_header,
    send_data,
    send_header,
)
from flm_megatron.errors import FlmError
from flm_megatron.json_text import Json, JsonObject

IDLE_S = 2 * 3600.0
TICK_S = 0.1
GREETING_S = 10.0
"""Seconds that an unknown peer may take for each message."""
CONNECTIONS = 1024
"""Open connections at a time; more are closed at once."""


class Agent:
    """Serves the blobs of one host on two listening sockets until `serve` ends."""

    def __init__(self, local: socket.socket, network: socket.socket, launcher: int | None, idle_s: float) -> None:
        """`launcher` is a descriptor (pidfd) that becomes readable when the launcher is gone."""
        self.listeners = {local.fileno(): (local, _Local), network.fileno(): (network, _Remote)}
        self.launcher, self.idle_s = launcher, idle_s
        self.address, self.port = network.getsockname()[:2]
        self.token = secrets.token_bytes(32)
        self.blobs = Blobs()
        self.stopped = threading.Event()
        self.spoken = time.monotonic()
        self.conversations = 0
        self.copying: dict[int, str] = {}
        """How the newest copy of each own rank at the peer stands: empty while it is under way, `whole`, or why not."""
        self.lock = threading.Lock()

    def serve(self) -> None:
        """Serve until the end."""
        poll = select.poll()
        for descriptor in (*self.listeners, *(() if self.launcher is None else (self.launcher,))):
            poll.register(descriptor, select.POLLIN)
        while not self.stopped.is_set() and self._idle_s() < self.idle_s:
            for descriptor, _ in poll.poll(1000 * TICK_S):
                if descriptor == self.launcher:
                    return
                self._accept(*self.listeners[descriptor])

    def _idle_s(self) -> float:
        """Seconds since the last connection was open."""
        return 0.0 if self.conversations else time.monotonic() - self.spoken

    def _accept(self, listener: socket.socket, kind: Callable[[Agent, socket.socket], _Conversation]) -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            if self.stopped.is_set() or self.conversations >= CONNECTIONS:
                connection.close()
                return
            with self.lock:
                self.conversations += 1
            threading.Thread(target=self._converse, args=(kind, connection), daemon=True).start()

    def _converse(self, kind: Callable[[Agent, socket.socket], _Conversation], connection: socket.socket) -> None:
        try:
            with connection:
                kind(self, connection).run()
        finally:
            with self.lock:
                self.conversations -= 1
                self.spoken = time.monotonic()

    def copy_to_peer(self, blob: Blob, header: JsonObject, keep: Generation, peer: Endpoint | None) -> None:
        """List an own blob and copy it to the peer; `copying` says how that went."""
        try:
            self.blobs.finish(blob, header, checksums(blob.data))
            if peer is not None:
                with RemoteAgent(peer) as remote:
                    remote.store(blob, keep)
            outcome = "whole"
        except Exception as error:  # whatever it is, training has to hear of it
            outcome = f"{peer.host if peer else 'this host'}: {error or type(error).__name__}"
        self.copying[blob.rank] = outcome


class _Conversation:
    """One connection: requests and answers until the other side closes it."""

    def __init__(self, agent: Agent, connection: socket.socket) -> None:
        self.agent, self.blobs, self.connection = agent, agent.blobs, connection
        # Of a host that was cut off nothing is heard, not even the end of its connections.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def run(self) -> None:
        """Serve the connection until it ends; an unknown request ends it."""
        with suppress(OSError, FlmError):
            self.connection.settimeout(GREETING_S)
            self.greet()
            while True:
                self.connection.settimeout(None)  # until the next refresh
                request = receive_header(self.connection)
                self.connection.settimeout(SILENCE_S)
                self._answer(request)
        self.ended()

    def greet(self) -> None:
        """Check whether the other side may talk to this agent; raises FlmError if not."""
        raise NotImplementedError

    def ended(self) -> None:
        """Called when the connection has ended."""

    def _answer(self, request: JsonObject) -> None:
        work = getattr(self, f"do_{request.get('do')}", None)
        try:
            if work is None:
                raise FlmError(f"there is no request {request.get('do')!r}")
            work(request)
        except FlmError as error:
            send_header(self.connection, {"error": str(error)})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FlmError(f"a request is not complete: {error}") from error

    def do_list(self, request: JsonObject) -> None:
        """All blobs, without their headers; with `check` only those whose checksums match."""
        blobs = self.blobs.checked() if request.get("check") else self.blobs.whole()
        keys = ("world", "stage", "step")
        listed = [
            {"generation": b.generation, "rank": b.rank, "own": b.own, **{key: b.header.get(key) for key in keys}}
            for b in blobs
        ]
        send_header(self.connection, {"blobs": listed, "newest": self.blobs.newest, "held": self.blobs.held})

    def do_describe(self, request: JsonObject) -> None:
        """The headers of all blobs of a generation."""
        wanted = _generation(request["generation"])
        found = [(b.rank, b.header) for b in self.blobs.whole() if b.generation == wanted]
        send_header(self.connection, {"headers": found})


class _Local(_Conversation):
    """A rank of this host."""

    def __init__(self, agent: Agent, connection: socket.socket) -> None:
        super().__init__(agent, connection)
        self.filling: Blob | None = None
        self.keep = NONE

    def greet(self) -> None:
        """Only the same user, as the kernel reports it."""
        raw = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", raw)[1] != os.getuid():
            raise FlmError("another user was refused")

    def ended(self) -> None:
        """Discard the blob that a rank was filling when it died."""
        if self.filling is not None:
            self.blobs.abandon(self.filling)

    def do_who(self, request: JsonObject) -> None:
        """The address of this agent for other hosts."""
        agent = self.agent
        send_header(self.connection, {"address": agent.address, "port": agent.port, "token": agent.token.hex()})

    def do_reserve(self, request: JsonObject) -> None:
        """Set the budget, and allocate memory for blobs of these sizes."""
        self.blobs.budget = int(request["budget"])
        self.blobs.reserve([int(size) for size in request["sizes"]])
        send_header(self.connection, {"held": self.blobs.held})

    def do_begin(self, request: JsonObject) -> None:
        """Memory for a rank's shard of a new generation, as a descriptor."""
        if self.filling is not None:
            self.blobs.abandon(self.filling)
            self.filling = None
        self.keep = _generation(request["keep"])
        generation, rank = _generation(request["generation"]), int(request["rank"])
        blob = self.blobs.begin(generation, self.keep, rank, True, int(request["nbytes"]))
        self.filling = blob
        send_header(self.connection, {"buffer": blob.buffer.number, "live": self.blobs.live()})
        socket.send_fds(self.connection, [b"\0"], [blob.buffer.fd])

    def do_commit(self, request: JsonObject) -> None:
        """The blob that was begun is filled: list it, and copy it to the peer in the background."""
        if self.filling is None:
            raise FlmError("nothing was begun")
        blob, self.filling = self.filling, None
        peer = Endpoint.from_json(request["peer"]) if request["peer"] else None
        self.agent.copying[blob.rank] = ""
        work = (blob, request["header"], self.keep, peer)
        threading.Thread(target=self.agent.copy_to_peer, args=work, daemon=True).start()
        send_header(self.connection, {})

    def do_state(self, request: JsonObject) -> None:
        """The state of a rank's newest copy."""
        send_header(self.connection, {"copy": self.agent.copying.get(int(request["rank"]), "whole")})

    def do_open(self, request: JsonObject) -> None:
        """A listed blob's memory, as a descriptor."""
        blob = self.blobs.find(_generation(request["generation"]), int(request["rank"]))
        send_header(self.connection, {})
        socket.send_fds(self.connection, [b"\0"], [blob.buffer.fd])

    def do_stop(self, request: JsonObject) -> None:
        """Stop: the job is done."""
        self.agent.stopped.set()
        send_header(self.connection, {})


class _Remote(_Conversation):
    """A rank or an agent of another host."""

    def __init__(self, agent: Agent, connection: socket.socket) -> None:
        super().__init__(agent, connection)
        # Without it the last few bytes of an answer wait for an acknowledgement that the other side puts off.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def greet(self) -> None:
        """Check that it knows the token."""
        demand_proof(self.connection, self.agent.token)

    def do_store(self, request: JsonObject) -> None:
        """Store a copy of another host's blob, which follows."""
        generation, rank, nbytes = _generation(request["generation"]), int(request["rank"]), int(request["nbytes"])
        blob = self.blobs.begin(generation, _generation(request["keep"]), rank, False, nbytes)
        try:
            send_header(self.connection, {})
            crcs = receive_data(self.connection, blob.data)
        except BaseException:
            self.blobs.abandon(blob)
            raise
        self.blobs.finish(blob, request["header"], crcs)
        send_header(self.connection, {})

    def do_read(self, request: JsonObject) -> None:
        """Send bytes of a blob, after checking the blocks that they are in."""
        blob = self.blobs.find(_generation(request["generation"]), int(request["rank"]))
        start, end = int(request["start"]), int(request["end"])
        if not 0 <= start < end <= blob.nbytes:
            raise FlmError(f"bytes {start} to {end} of a blob of {blob.nbytes} were asked for")
        first, last = start // BLOCK, -(-end // BLOCK)
        if checksums(blob.data[first * BLOCK : last * BLOCK]) != blob.crcs[first:last]:
            raise FlmError(f"bytes {start} to {end} of rank {blob.rank}'s copy have changed")
        data = blob.data[start:end]
        send_header(self.connection, {})
        send_data(self.connection, data, checksums(data))


def _generation(value: Json) -> Generation:
    start, number = value
    return Generation(int(start), int(number))


def main(arguments: list[str]) -> int:
    """Entry point: `LOCAL NETWORK LAUNCHER IDLE_S`, where the first three are inherited descriptors: two listening
    sockets and a pidfd."""
    local, network, launcher = map(int, arguments[:3])
    listeners = [socket.socket(fileno=descriptor) for descriptor in (local, network)]
    Agent(listeners[0], listeners[1], None if launcher < 0 else launcher, float(arguments[3])).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
