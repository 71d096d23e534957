"""The host agent as it really runs, a process of its own: what it keeps, what it refuses, and when it ends."""

from __future__ import annotations

import json
import mmap
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from isal.isal_zlib import crc32

from flm_megatron.checkpoint.memory.blobs import NONE, Generation
from flm_megatron.checkpoint.memory.client import Endpoint, LocalAgent, RemoteAgent
from flm_megatron.checkpoint.memory.starting import agent_name, obstacle, start_agent
from flm_megatron.checkpoint.memory.wire import BLOCK, LARGEST_HEADER, checksums, receive_data, send_data
from flm_megatron.errors import DamagedError, FlmError
from tests.support.memory_cases import BUDGET, HEADER, SOON_S, agents, begin, fill, launcher, overwrite, wait_until

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
FIRST, SECOND, THIRD = (Generation(1, number) for number in (1, 2, 3))


@pytest.fixture
def agent() -> Iterator[LocalAgent]:
    """One agent."""
    with agents() as made:
        yield made[0]


def generations(agent: LocalAgent) -> list[tuple[list[int], int, bool]]:
    return sorted((blob["generation"], blob["rank"], blob["own"]) for blob in agent.ask("list")["blobs"])


def read(remote: RemoteAgent, start: int, end: int, rank: int = 0) -> bytes:
    """What an agent sends of its first generation."""
    data = bytearray(end - start)
    remote.read(FIRST, rank, start, memoryview(data))
    return bytes(data)


def test_bytes_come_back_from_this_host_and_from_its_neighbour() -> None:
    data = secrets.token_bytes(3 * BLOCK + 4321)
    with agents(2) as (near, far):
        fill(near, FIRST, NONE, data, far.endpoint(), rank=5)
        assert near.copy_state(5) == "whole"
        assert generations(near) == [([1, 1], 5, True)] and generations(far) == [([1, 1], 5, False)]
        for agent in (near, far):
            descriptor = agent.open(FIRST, 5)
            assert os.pread(descriptor, len(data), 0) == data
            os.close(descriptor)
            with RemoteAgent(agent.endpoint()) as remote:
                for start, end in ((0, len(data)), (BLOCK - 1, BLOCK + 1), (3 * BLOCK, len(data)), (7, 8)):
                    assert read(remote, start, end, 5) == data[start:end]
                assert remote.ask("describe", generation=FIRST)["headers"] == [[5, HEADER]]


def test_two_generations_take_turns_in_the_same_memory() -> None:
    with agents(2) as (near, far):
        peer = far.endpoint()
        numbers = [fill(near, FIRST, NONE, b"a" * 9000, peer)]
        numbers.append(fill(near, SECOND, FIRST, b"b" * 9000, peer))
        assert [key[0] for key in generations(near)] == [key[0] for key in generations(far)] == [[1, 1], [1, 2]]
        numbers.append(fill(near, THIRD, SECOND, b"c" * 9000, peer))
        assert [key[0] for key in generations(near)] == [key[0] for key in generations(far)] == [[1, 2], [1, 3]]
        assert numbers[2] == numbers[0] != numbers[1]
        assert near.ask("list")["held"] == far.ask("list")["held"] == 2 * 3 * mmap.PAGESIZE


def test_a_generation_that_was_never_finished_is_not_listed(agent: LocalAgent) -> None:
    fill(agent, FIRST, NONE, b"whole")
    begin(agent, SECOND, FIRST, b"half")
    assert [key[0] for key in generations(agent)] == [[1, 1]]
    with pytest.raises(FlmError, match="no copy of rank 0 of generation"):
        agent.open(SECOND, 0)


def test_the_memory_of_a_rank_that_dies_while_it_copies_is_used_again(agent: LocalAgent) -> None:
    agent.reserve([], 2 * mmap.PAGESIZE)
    fill(agent, FIRST, NONE, b"whole")
    rank = LocalAgent(os.fsdecode(agent.socket.getpeername()[1:]))
    begin(rank, SECOND, FIRST, b"half")
    rank.close()
    wait_until(lambda: _begins(agent, Generation(2, 1), FIRST))


def _begins(agent: LocalAgent, generation: Generation, keep: Generation) -> bool:
    try:
        begin(agent, generation, keep, b"again")
    except FlmError:
        return False
    return True


def test_an_older_generation_comes_too_late(agent: LocalAgent) -> None:
    fill(agent, SECOND, NONE, b"new")
    with pytest.raises(FlmError, match=r"\(1, 1\) are offered after \(1, 2\)"):
        begin(agent, FIRST, NONE, b"old")
    assert [key[0] for key in generations(agent)] == [[1, 2]]


def test_the_budget_holds_for_own_and_for_foreign_copies() -> None:
    with agents(2) as (near, far):
        near.reserve([], 4 * mmap.PAGESIZE)
        far.reserve([], mmap.PAGESIZE)
        with pytest.raises(FlmError, match=f"beyond the budget of {4 * mmap.PAGESIZE} bytes"):
            begin(near, FIRST, NONE, bytes(5 * mmap.PAGESIZE))
        fill(near, FIRST, NONE, bytes(2 * mmap.PAGESIZE), far.endpoint())
        assert f"beyond the budget of {mmap.PAGESIZE} bytes" in near.copy_state(0)
        assert generations(far) == [] and generations(near) == [([1, 1], 0, True)]


def test_memory_that_was_set_aside_serves_what_is_begun(agent: LocalAgent) -> None:
    agent.reserve([9000, 9000, 5], BUDGET)
    held = agent.ask("list")["held"]
    assert held == 7 * mmap.PAGESIZE
    for rank, size in enumerate((9000, 5, 9000)):
        begin(agent, FIRST, NONE, bytes(size), rank)
        agent.commit(HEADER, None)
    assert agent.ask("list")["held"] == held


def test_a_flipped_bit_is_found_in_memory_and_on_the_way() -> None:
    with agents(2) as (near, far):
        fill(near, FIRST, NONE, bytes(3 * BLOCK), far.endpoint())
        overwrite(far, FIRST, 0, 2 * BLOCK + 99)
        with RemoteAgent(far.endpoint()) as remote:
            assert read(remote, 0, 2 * BLOCK) == bytes(2 * BLOCK)
            for start, end in ((2 * BLOCK, 3 * BLOCK), (2 * BLOCK, 2 * BLOCK + 1), (BLOCK, 2 * BLOCK + 200)):
                with pytest.raises(FlmError, match="of rank 0's copy have changed"):
                    read(remote, start, end)
            assert remote.ask("list", check=True)["blobs"] == []
        assert len(near.ask("list", check=True)["blobs"]) == 1


def test_a_neighbour_that_cannot_be_reached_is_named_and_the_own_copy_stays(agent: LocalAgent) -> None:
    fill(agent, FIRST, NONE, b"own", Endpoint("node7", "127.0.0.1", 1, "00"))
    assert agent.copy_state(0).startswith("node7: ")
    assert generations(agent) == [([1, 1], 0, True)]


# What an attacker, a port scanner or a broken program may send.


@pytest.fixture(scope="module")
def target() -> Iterator[LocalAgent]:
    """One agent for all that is sent to it, since it changes nothing."""
    with agents() as made:
        fill(made[0], FIRST, NONE, b"data")
        yield made[0]


def connected(agent: LocalAgent) -> socket.socket:
    endpoint = agent.endpoint()
    connection = socket.create_connection((endpoint.address, endpoint.port))
    connection.settimeout(SOON_S)
    return connection


def known(agent: LocalAgent) -> socket.socket:
    """A connection that has proved that it knows the token."""
    return RemoteAgent(agent.endpoint()).socket


def ended(connection: socket.socket) -> bool:
    """Whether the other side ends the connection, with nothing more to say than an error."""
    with connection:
        try:
            while chunk := connection.recv(2**16):
                assert b"error" in chunk or chunk.startswith(b"flmcopy1"), chunk
        except ConnectionResetError:
            pass
    return True


def test_a_wrong_token_is_refused(agent: LocalAgent) -> None:
    endpoint = agent.endpoint()
    with pytest.raises(FlmError, match="refused the connection"):
        RemoteAgent(Endpoint("host", endpoint.address, endpoint.port, secrets.token_hex(32)))


def test_who_knows_no_token_is_not_believed() -> None:
    """A program that has taken over the port of an agent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = (
            "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True);"
            "c, _ = s.accept(); c.sendall(b'flmcopy1' + bytes(32)); c.recv(99); c.sendall(bytes(32))"
        )
        impostor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        try:
            assert impostor.stdout is not None
            port = int(impostor.stdout.readline())
            with pytest.raises(FlmError, match="does not know the run's token"):
                RemoteAgent(Endpoint("host", "127.0.0.1", port, secrets.token_hex(32)))
        finally:
            impostor.kill()
            impostor.communicate()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
        bytes(64),
        bytes(range(64)),
        bytes(range(40)),
    ],
)
def test_strangers_are_shown_the_door(target: LocalAgent, sent: bytes) -> None:
    connection = connected(target)
    with suppress(OSError):  # it may be ended before all is sent
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
    assert ended(connection)
    assert generations(target) == [([1, 1], 0, True)]


def word(size: int) -> bytes:
    return struct.pack("<I", size)


def message(value: object) -> bytes:
    data = json.dumps(value).encode()
    return word(len(data)) + data


@pytest.mark.parametrize(
    "sent",
    [
        word(2**32 - 1),
        word(LARGEST_HEADER + 1) + b"x",
        word(5) + b"{not}",
        word(3) + b"{",
        word(40_000) + b"[" * 40_000,
        message([1, 2]),
        message({"do": "stop"}),
        message({"do": "begin", "generation": [9, 9], "keep": [0, 0], "rank": 0, "nbytes": 1}),
        message({"do": "__init__"}),
        message({"do": None}),
        message({"do": ["list"]}),
        message({"do": "store"}),
        message({"do": "store", "generation": [1, 1], "keep": [0, 0], "rank": 0, "nbytes": -5, "header": {}}),
        message({"do": "store", "generation": [1, 1], "keep": [0, 0], "rank": 0, "nbytes": 2**62, "header": {}}),
        message({"do": "store", "generation": [1, 1], "keep": [0, 0], "rank": 0, "nbytes": 1e999, "header": {}}),
        message({"do": "store", "generation": "first", "keep": [0, 0], "rank": 0, "nbytes": 1, "header": {}}),
        message({"do": "store", "generation": [0, 1], "keep": [0, 0], "rank": 0, "nbytes": 99, "header": {}})
        + b"short",
        message({"do": "read", "generation": [1, 1], "rank": 0, "start": 0, "end": 5}),
        message({"do": "read", "generation": [1, 1], "rank": 0, "start": -1, "end": 1}),
        message({"do": "read", "generation": [1, 1], "rank": 0, "start": 2, "end": 2}),
        message({"do": "read", "generation": [1, 1], "rank": 9, "start": 0, "end": 1}),
    ],
)
def test_what_is_not_understood_changes_nothing(target: LocalAgent, sent: bytes) -> None:
    connection = known(target)
    connection.settimeout(SOON_S)
    with suppress(OSError):  # it may be ended before all is sent
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
    assert ended(connection)
    assert generations(target) == [([1, 1], 0, True)]
    with RemoteAgent(target.endpoint()) as remote:
        assert read(remote, 0, 4) == b"data"


def test_a_block_that_is_damaged_on_the_way_is_refused_and_the_next_is_understood() -> None:
    near, far = socket.socketpair()
    data = bytes(BLOCK) + b"rest"
    into = memoryview(bytearray(len(data)))
    with near, far:
        for wrong in (True, False):
            crcs = checksums(memoryview(data))
            sender = threading.Thread(target=send_data, args=(near, memoryview(data), [crcs[0] ^ wrong, crcs[1]]))
            sender.start()
            if wrong:
                with pytest.raises(DamagedError, match="block 0 does not have the checksum"):
                    receive_data(far, into)
            else:
                assert receive_data(far, into) == crcs and bytes(into) == data
            sender.join()


def test_a_copy_that_is_damaged_on_the_way_is_not_kept(agent: LocalAgent) -> None:
    remote = RemoteAgent(agent.endpoint())
    values = {"generation": [1, 1], "keep": [0, 0], "rank": 3, "nbytes": 4, "header": HEADER}
    for data, kept in ((b"dat\0", False), (b"data", True)):
        remote.ask("store", **values)
        remote.socket.sendall(data + struct.pack("<I", crc32(b"data")))
        if kept:
            remote.answer()
        else:
            with pytest.raises(FlmError, match="checksum"):
                remote.answer()
        assert [blob["rank"] for blob in agent.ask("list")["blobs"]] == ([3] if kept else [])
    remote.close()


# Its end.


def agent_process(process: subprocess.Popen[str]) -> psutil.Process:
    """The agent that serves a launcher: the one that listens where it says."""
    with LocalAgent(agent_name(process.pid)) as agent:
        port = agent.endpoint().port
    children = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return next(p for p in children if any(c.laddr and c.laddr.port == port for c in p.net_connections("tcp")))


def test_it_ends_with_the_launcher() -> None:
    with launcher() as process:
        start_agent(process.pid, "127.0.0.1")
        agent = agent_process(process)
        process.kill()
        assert agent.wait(SOON_S) == 0
    with pytest.raises(OSError):
        LocalAgent(agent_name(process.pid))


def test_it_ends_when_it_is_told_to() -> None:
    with launcher() as process:
        start_agent(process.pid, "127.0.0.1")
        agent = agent_process(process)
        with LocalAgent(agent_name(process.pid)) as local:
            local.stop()
        assert agent.wait(SOON_S) == 0


def test_it_ends_when_nobody_has_spoken_to_it_for_long() -> None:
    with launcher() as process:
        start_agent(process.pid, "127.0.0.1", idle_s=0.3)
        assert agent_process(process).wait(SOON_S) == 0


def test_it_stays_as_long_as_a_rank_is_connected() -> None:
    with agents(idle_s=0.3) as (agent,):
        time.sleep(1.2)
        assert agent.ask("list")["blobs"] == []


def test_a_second_start_finds_the_first(agent: LocalAgent) -> None:
    before = agent.endpoint()
    launcher_id = int(os.fsdecode(agent.socket.getpeername()).rsplit("-", 1)[1])
    start_agent(launcher_id, "127.0.0.1")
    with LocalAgent(agent_name(launcher_id)) as again:
        assert again.endpoint() == before


def test_an_address_that_is_not_this_hosts_is_refused() -> None:
    with launcher() as process, pytest.raises(FlmError, match=r"cannot start on 192\.0\.2\.1"):
        start_agent(process.pid, "192.0.2.1")
