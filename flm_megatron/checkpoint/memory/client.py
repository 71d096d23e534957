"""Talking to host agents: to this host's through its Unix socket, to others over TCP."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from flm_megatron.checkpoint.memory.wire import (
    SILENCE_S,
    give_proof,
    receive_data,
    receive_header,
    send_data,
    send_header,
)
from flm_megatron.errors import FlmError
from flm_megatron.json_text import Json, JsonObject

if TYPE_CHECKING:
    from flm_megatron.checkpoint.memory.blobs import Blob, Generation

C = TypeVar("C", bound="_Connection")
CONNECT_S = 10.0
RESERVE_S = 1800.0
"""Timeout of a reservation: untouched pages come at a few GiB a second at best."""


@dataclass(frozen=True)
class Endpoint:
    """The address of a host's agent, and the token that it asks for."""

    host: str
    address: str
    port: int
    token: str = field(repr=False)

    def to_json(self) -> list[str | int]:
        """As plain data."""
        return [self.host, self.address, self.port, self.token]

    @classmethod
    def from_json(cls, data: Json) -> Endpoint:
        """The endpoint from `to_json`'s result."""
        host, address, port, token = data
        return cls(str(host), str(address), int(port), str(token))


class _Connection:
    """Requests to an agent, one at a time."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.socket, self.name = connection, name

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def ask(self, do: str, **values: object) -> JsonObject:
        """Send a request; returns the answer. Raises FlmError with the agent's error, or OSError."""
        send_header(self.socket, {"do": do, **values})
        return self.answer()

    def answer(self) -> JsonObject:
        """The next answer; raises as `ask`."""
        answer = receive_header(self.socket)
        if "error" in answer:
            raise FlmError(f"{self.name}: {answer['error']}")
        return answer


class RemoteAgent(_Connection):
    """An agent over TCP."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises OSError if it cannot be reached, FlmError if it does not accept the token."""
        connection = socket.create_connection((endpoint.address, endpoint.port), CONNECT_S)
        super().__init__(connection, f"agent of {endpoint.host}")
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(SILENCE_S)
            give_proof(connection, bytes.fromhex(endpoint.token))
        except BaseException:
            connection.close()
            raise

    def store(self, blob: Blob, keep: Generation) -> None:
        """Copy a listed blob to it; returns when the copy is complete and checked there."""
        values = {"generation": blob.generation, "keep": keep, "rank": blob.rank, "nbytes": blob.nbytes}
        self.ask("store", **values, header=blob.header)
        send_data(self.socket, blob.data, blob.crcs)
        self.answer()

    def read(self, generation: Generation, rank: int, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a blob from `start` on. Raises FlmError if they have changed, or OSError."""
        self.ask("read", generation=generation, rank=rank, start=start, end=start + into.nbytes)
        receive_data(self.socket, into)


class LocalAgent(_Connection):
    """The agent of this host."""

    def __init__(self, name: str) -> None:
        """`name` is that of its socket. Raises OSError if there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        super().__init__(connection, "this host's agent")
        try:
            connection.settimeout(SILENCE_S)
            connection.connect(f"\0{name}")
        except BaseException:
            connection.close()
            raise

    def endpoint(self) -> Endpoint:
        """The endpoint for other hosts."""
        answer = self.ask("who")
        return Endpoint(socket.gethostname(), answer["address"], answer["port"], answer["token"])

    def reserve(self, sizes: list[int], budget: int) -> None:
        """Allocate memory for blobs of these sizes; from now on all blobs may take `budget` bytes."""
        self.socket.settimeout(RESERVE_S)
        self.ask("reserve", sizes=sizes, budget=budget)
        self.socket.settimeout(SILENCE_S)

    def begin(self, generation: Generation, keep: Generation, rank: int, nbytes: int) -> tuple[int, list[int], int]:
        """Memory for this rank's shard of a generation; all generations but it and `keep` are dropped.

        Returns the memory's number, the numbers of all buffers, and a descriptor, to be closed by the caller.
        """
        answer = self.ask("begin", generation=generation, keep=keep, rank=rank, nbytes=nbytes)
        return answer["buffer"], answer["live"], self._descriptor()

    def commit(self, header: Mapping[str, object], peer: Endpoint | None) -> None:
        """The blob that was begun is filled: list it under this header and copy it to `peer` in the background."""
        self.ask("commit", header=header, peer=peer.to_json() if peer else None)

    def copy_state(self, rank: int) -> str:
        """The state of a rank's newest copy: empty while in progress, `whole`, or why there is none."""
        return str(self.ask("state", rank=rank)["copy"])

    def stop(self) -> None:
        """Tell it to end."""
        self.ask("stop")

    def open(self, generation: Generation, rank: int) -> int:
        """A descriptor of a listed blob's memory, to be closed by the caller."""
        self.ask("open", generation=generation, rank=rank)
        return self._descriptor()

    def _descriptor(self) -> int:
        _, descriptors, _, _ = socket.recv_fds(self.socket, 1, 1)
        if not descriptors:
            raise FlmError(f"{self.name} sent no memory")
        return descriptors[0]
