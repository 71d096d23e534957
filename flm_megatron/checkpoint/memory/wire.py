"""The protocol of ranks and host agents: a header of plain JSON, then bytes in blocks with their CRC-32.

Nothing that arrives is unpickled or run, and nothing is read beyond the limits below.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
from collections.abc import Iterator, Mapping

from isal.isal_zlib import crc32

from flm_megatron.errors import DamagedError, FlmError
from flm_megatron.json_text import JsonObject

BLOCK = 2**20
"""Bytes under one checksum."""
LARGEST_HEADER = 64 * 2**20
SILENCE_S = 60.0
"""Seconds that either side may keep the other waiting."""
GREETING = b"flmcopy1"
NONCE = PROOF = 32
WORD = struct.Struct("<I")


def demand_proof(connection: socket.socket, token: bytes) -> None:
    """Have the other side prove that it knows `token`, and prove it in return; the token itself is never sent.

    Raises:
        FlmError: it does not know the token.
        OSError: the connection ended.
    """
    nonce = secrets.token_bytes(NONCE)
    connection.sendall(GREETING + nonce)
    answer = receive_exactly(connection, NONCE + PROOF)
    theirs, proof = answer[:NONCE], answer[NONCE:]
    if not hmac.compare_digest(proof, _proof(token, b"client", nonce, theirs)):
        raise FlmError("a connection without the run's token was refused")
    connection.sendall(_proof(token, b"server", nonce, theirs))


def give_proof(connection: socket.socket, token: bytes) -> None:
    """The other half of `demand_proof`. Raises FlmError if the other side is no agent of this run, or OSError."""
    greeting = receive_exactly(connection, len(GREETING) + NONCE)
    if greeting[: len(GREETING)] != GREETING:
        raise FlmError("what answers is not a host agent of this program, or one of another version")
    nonce, mine = greeting[len(GREETING) :], secrets.token_bytes(NONCE)
    connection.sendall(mine + _proof(token, b"client", nonce, mine))
    try:
        proof = receive_exactly(connection, PROOF)
    except OSError as error:
        raise FlmError(f"the host agent refused the connection: {error}") from error
    if not hmac.compare_digest(proof, _proof(token, b"server", nonce, mine)):
        raise FlmError("what answers does not know the run's token")


def _proof(token: bytes, side: bytes, nonce: bytes, other: bytes) -> bytes:
    return hmac.digest(token, side + nonce + other, "sha256")


def send_header(connection: socket.socket, header: Mapping[str, object]) -> None:
    """Send one JSON object. Raises FlmError if it is too large for the other side to accept, or OSError."""
    data = json.dumps(header).encode()
    if len(data) > LARGEST_HEADER:
        raise FlmError(f"a message of {len(data)} bytes is beyond the limit of {LARGEST_HEADER}")
    connection.sendall(WORD.pack(len(data)) + data)


def receive_header(connection: socket.socket) -> JsonObject:
    """Receive one JSON object. Raises FlmError for anything else, before reading more than the limit, or OSError."""
    (size,) = WORD.unpack(receive_exactly(connection, WORD.size))
    if size > LARGEST_HEADER:
        raise FlmError(f"a message of {size} bytes was announced, the limit is {LARGEST_HEADER}")
    try:
        header = json.loads(receive_exactly(connection, size))
    except (ValueError, RecursionError) as error:
        raise FlmError(f"a message is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FlmError("a message is not a JSON object")
    return header


def checksums(data: memoryview) -> list[int]:
    """CRC-32 of each block of `data`."""
    return [crc32(block) for block in _blocks(data)]


def send_data(connection: socket.socket, data: memoryview, crcs: list[int]) -> None:
    """Send bytes with the checksums of their blocks, made when the bytes were known to be correct."""
    for block, crc in zip(_blocks(data), crcs, strict=True):
        connection.sendall(block)
        connection.sendall(WORD.pack(crc))


def receive_data(connection: socket.socket, into: memoryview) -> list[int]:
    """Fill `into` with the bytes of `send_data`; returns the checksums.

    Raises:
        DamagedError: a block is not what was sent, or was no longer right when it was sent.
        OSError: the connection ended.
    """
    crcs: list[int] = []
    wrong: list[int] = []
    for block in _blocks(into):
        receive_into(connection, block)
        (wanted,) = WORD.unpack(receive_exactly(connection, WORD.size))
        if crc32(block) != wanted:
            wrong.append(len(crcs))
        crcs.append(wanted)
    if wrong:  # only now: what follows on the connection can still be understood
        raise DamagedError(f"block {wrong[0]} does not have the checksum that it was sent with")
    return crcs


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes. Raises ConnectionError when the other side ends before."""
    data = bytearray(size)
    receive_into(connection, memoryview(data))
    return bytes(data)


def receive_into(connection: socket.socket, into: memoryview) -> None:
    """Fill `into`. Raises ConnectionError when the other side ends before."""
    while into.nbytes:
        count = connection.recv_into(into)
        if not count:
            raise ConnectionResetError("the connection was closed by the other side")
        into = into[count:]


def _blocks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, data.nbytes, BLOCK):
        yield data[start : start + BLOCK]
