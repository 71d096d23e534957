"""Host agents as they really run, processes of their own, for tests on one machine."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from flm_megatron.checkpoint.memory.blobs import Generation
from flm_megatron.checkpoint.memory.client import Endpoint, LocalAgent
from flm_megatron.checkpoint.memory.starting import agent_name, start_agent
from flm_megatron.errors import FlmError

HEADER: dict[str, Any] = {"world": 1, "stage": "small", "step": 4}
BUDGET = 64 * 2**20
SOON_S = 10.0


@contextmanager
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A process that stands for the one that starts ranks."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def agents(count: int = 1, idle_s: float = 60.0) -> Iterator[list[LocalAgent]]:
    """Agents as on `count` hosts, ready for blobs of BUDGET bytes; they end with the block."""
    made: list[LocalAgent] = []
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(launcher())
            start_agent(process.pid, "127.0.0.1", idle_s)
            made.append(LocalAgent(agent_name(process.pid)))
            made[-1].reserve([], BUDGET)
        try:
            yield made
        finally:
            for agent in made:
                with suppress(FlmError, OSError):
                    agent.stop()
                agent.close()


def begin(agent: LocalAgent, generation: Generation, keep: Generation, data: bytes, rank: int = 0) -> int:
    """Fill memory as a rank does; returns the memory's number."""
    number, _, descriptor = agent.begin(generation, keep, rank, len(data))
    try:
        with mmap.mmap(descriptor, os.fstat(descriptor).st_size) as memory:
            memory[: len(data)] = data
    finally:
        os.close(descriptor)
    return number


def fill(
    agent: LocalAgent,
    generation: Generation,
    keep: Generation,
    data: bytes,
    peer: Endpoint | None = None,
    rank: int = 0,
    header: dict[str, Any] = HEADER,
) -> int:
    """Keep `data` as a rank does, and wait until it is known how that went; returns the memory's number."""
    number = begin(agent, generation, keep, data, rank)
    agent.commit(header, peer)
    wait_until(lambda: agent.copy_state(rank) != "")
    return number


def wait_until(true: Callable[[], bool]) -> None:
    """Wait a little for something to become true."""
    deadline = time.monotonic() + SOON_S
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def overwrite(agent: LocalAgent, generation: Generation, rank: int, position: int) -> None:
    """Flip a bit in what an agent holds."""
    descriptor = agent.open(generation, rank)
    byte = os.pread(descriptor, 1, position)[0]
    os.pwrite(descriptor, bytes([byte ^ 4]), position)
    os.close(descriptor)
