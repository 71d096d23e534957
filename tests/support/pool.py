"""Real gloo processes for tests: forked from a server that has already imported torch and megatron-core.

Importing torch costs seconds on two cores, forking milliseconds. Every run gets fresh processes, so nothing leaks
from one layout into the next, and a crash or a hang ends one run only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

TIMEOUT_S = 180


class RankFailed(AssertionError):
    """A rank raised or died; the message holds its traceback."""


class Pool:
    """Runs functions on several gloo processes at once."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["flm_megatron.distributed.preload"])

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Call `function(*args)` on every rank of a fresh gloo world; results in the order of ranks.

        `function` must be importable by name. Raises RankFailed with the first failing rank's traceback, TimeoutError
        when a rank is still running after `timeout_s`.
        """
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                self._start(rank, world_size, Path(folder) / "store", function, args) for rank in range(world_size)
            ]
            try:
                return _collect(ranks, time.monotonic() + timeout_s)
            finally:
                for process, connection in ranks:
                    _end(process)
                    connection.close()

    def _start(
        self, rank: int, world_size: int, store: Path, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        here, there = self.context.Pipe()
        process = self.context.Process(target=_rank_main, args=(there, rank, world_size, str(store), function, args))
        process.start()
        there.close()
        return process, here


def _end(process: Any) -> None:
    """End a rank, and the helpers that megatron-core's own saving has started in it."""
    try:
        helpers = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        helpers = []
    process.kill()
    process.join()
    for helper in helpers:
        with contextlib.suppress(psutil.NoSuchProcess):
            helper.kill()


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        open_ranks = {connection: rank for rank, (_, connection) in enumerate(ranks) if rank not in results}
        ready = wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(open_ranks.values())} are still running")
        for connection, rank in open_ranks.items():
            if connection not in ready:
                continue
            try:
                failed, value = connection.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if failed:
                raise RankFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    connection: Connection, rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
        message = (False, function(*args))
    except BaseException:
        message = (True, traceback.format_exc())
    connection.send(message)
    connection.poll(TIMEOUT_S)  # stay until the parent ends this process: leaving would break peers' collectives
