"""Which rank is gone: every rank of a launched world beats in the launcher's store. The first rank listens to all
others, and tells them; they listen to the first.

A collective that waits for a host which was cut off cannot say whom it waits for, and NCCL's ends the process. So a
thread of every rank tells the store that it is alive. Where a rank stays silent for most of `distributed.timeout_s`,
or the store cannot be reached, the process ends with status 1 and one line that names the rank or the store.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from flm_megatron.training.elastic import leave_word

SILENCE = 0.8
"""Share of the timeout after which a silent rank is lost: before a collective gives up, which names nobody."""
BEATS = 20
LONGEST_INTERVAL_S = 10.0
LOST = "lost"


@contextmanager
def heartbeat(timeout_s: float) -> Iterator[None]:
    """While the block runs, a lost rank, or a lost store, ends this process. Needs the world of `env://`."""
    agreed = [os.urandom(8).hex()]
    dist.broadcast_object_list(agreed)  # the launcher's store may hold the beats of an earlier start
    beats = Heartbeat(f"heartbeat/{agreed[0]}", dist.get_rank(), dist.get_world_size(), timeout_s)
    beats.start()
    dist.barrier()  # all have beaten once
    try:
        yield
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            # A step longer than what is left of the timeout: who is lost will be known soon.
            time.sleep((1 - SILENCE) * timeout_s)
        raise
    finally:
        beats.stop()


class Heartbeat:
    """One rank's beat and ear, in two threads: the first talks to the store, the second sees when that gets stuck."""

    def __init__(self, prefix: str, rank: int, size: int, timeout_s: float) -> None:
        """Connect to the store at MASTER_ADDR:MASTER_PORT; silence of `SILENCE * timeout_s` seconds is too long."""
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.prefix, self.rank, self.size = prefix, rank, size
        self.limit_s = SILENCE * timeout_s
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / BEATS)
        # A connection of its own: the world's is held by whoever waits for a new group.
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
        )
        self.answered = time.monotonic()
        self.stopped = threading.Event()
        works = (self._beat, self._watch)
        self.threads = [threading.Thread(target=work, name="heartbeat", daemon=True) for work in works]
        self.heard = dict.fromkeys(range(1, size) if rank == 0 else (0,), ("", self.answered))

    def start(self) -> None:
        """Say which host this is, and begin."""
        self.store.set(self._key(f"host/{self.rank}"), socket.gethostname())
        self.store.set(self._key(str(self.rank)), "0")
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End: from now on silence means nothing."""
        self.stopped.set()
        for thread in self.threads:
            # One that is still inside the store when the interpreter ends would abort the process.
            thread.join(self.limit_s)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _beat(self) -> None:
        """Beat and listen until the block ends; a store that fails is left to `_watch`."""
        count = 0
        while not self.stopped.wait(self.interval_s):
            count += 1
            try:
                self.store.set(self._key(str(self.rank)), str(count))
                lost = self._told() or self._listen()
            except RuntimeError:
                continue
            self.answered = time.monotonic()
            if lost and not self.stopped.is_set():
                self._end(lost)

    def _told(self) -> str:
        """What the first rank has found out."""
        key = self._key(LOST)
        return self.store.get(key).decode() if self.rank and self.store.check([key]) else ""

    def _listen(self) -> str:
        """Note who has beaten since the last time; the ranks that were silent for too long, in words."""
        if not self.heard:
            return ""
        now = time.monotonic()
        values = self.store.multi_get([self._key(str(peer)) for peer in self.heard])
        for peer, value in zip(self.heard, values, strict=True):
            if value.decode() != self.heard[peer][0]:
                self.heard[peer] = (value.decode(), now)
        silent = [peer for peer, (_, since) in self.heard.items() if now - since > self.limit_s]
        if not silent:
            return ""
        text = self._describe(silent)
        if self.rank == 0:
            self.store.set(self._key(LOST), text)
        return text

    def _describe(self, silent: list[int]) -> str:
        hosts: dict[str, list[int]] = {}
        for peer in silent:
            hosts.setdefault(self.store.get(self._key(f"host/{peer}")).decode(), []).append(peer)
        named = "; ".join(f"{_ranks(peers)} on host {host}" for host, peers in hosts.items())
        return f"no sign of life for {self.limit_s:g} s from {named}: the host or its network is down"

    def _watch(self) -> None:
        """End the process when the store has not answered for too long."""
        while not self.stopped.wait(self.interval_s):
            silence = time.monotonic() - self.answered
            if silence > self.limit_s:
                self._end(
                    f"host {socket.gethostname()} has not reached the first rank's host ({self.address}) for "
                    f"{silence:.0f} s: this host or that one is cut off from the network"
                )

    def _end(self, text: str) -> None:
        """End at once: the main thread waits inside a collective and cannot be told."""
        text = f"rank {self.rank}: {text}"
        print(f"flm train: {text}", file=sys.stderr, flush=True)
        leave_word(text, 1)
        if self.rank == 0:
            # The store may live in this process; let the others read first.
            time.sleep(2 * self.interval_s)
        os._exit(1)


def _ranks(peers: list[int]) -> str:
    return f"rank {peers[0]}" if len(peers) == 1 else f"ranks {', '.join(map(str, peers))}"
