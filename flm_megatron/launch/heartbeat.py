"""Detects lost ranks: every rank of a launched world sends a heartbeat through the launcher's store.

The first rank listens to all others and they listen to the first. A collective that waits for a host which was cut off
cannot say which, and NCCL's ends the process. So a thread of every rank tells the store that it is alive. When a rank
is silent for most of `distributed.timeout_s`, or the store cannot be reached, the process ends with status 1 and one
line that names the rank or the store.

A lost host that nobody replaces is found earlier: every rank holds a connection to the one before it and checks that it
stands. If that rank is gone, all of them end at once. A process that was told to stop, by a launcher that knows of the
loss, does not wait for a host that does not answer: it would be killed inside a collective (after 30 s by torchrun).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from flm_megatron.distributed.channels import broadcast
from flm_megatron.distributed.error_file import write_error_file
from flm_megatron.distributed.signals import told_to_stop
from flm_megatron.launch.neighbour import Neighbour

SILENCE = 0.8
"""Fraction of the timeout after which a silent rank is lost: earlier than collectives time out, which name nobody."""
BEATS = 20
LONGEST_INTERVAL_S = 5.0
HURRIED_S = 1.0
"""Seconds between two beats of a process that was told to stop, or has lost the connection to its neighbour."""
MISSES = 5
"""Unanswered requests to the store of a process that was told to stop, after which the store is lost."""
LOST = "lost"


@contextmanager
def heartbeat(timeout_s: float) -> Iterator[None]:
    """During the block a lost rank or a lost store ends this process. Needs the world of `env://`."""
    agreed = broadcast(os.urandom(8).hex())  # the launcher's store may hold the beats of an earlier start
    beats = Heartbeat(f"heartbeat/{agreed}", dist.get_rank(), dist.get_world_size(), timeout_s)
    beats.start()
    dist.barrier()  # all have beaten once
    in_order = False
    try:
        yield
        in_order = True
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            # A step longer than what is left of the timeout: who is lost will be known soon.
            time.sleep((1 - SILENCE) * timeout_s)
        raise
    finally:
        beats.stop(in_order)


class Heartbeat:
    """The heartbeat of one rank in two threads: the first talks to the store, the second notices when it hangs."""

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
        self.in_order = False
        self.neighbour = Neighbour(self.store, self._key, rank, size)
        self.heard = dict.fromkeys(range(1, size) if rank == 0 else (0,), ("", self.answered))

    def start(self) -> None:
        """Publish this host's name and begin."""
        self.store.set(self._key(f"host/{self.rank}"), socket.gethostname())
        self.store.set(self._key(str(self.rank)), "0")
        for thread in self.threads:
            thread.start()

    def stop(self, in_order: bool) -> None:
        """End: silence no longer means anything and, if that is `in_order`, neither does absence."""
        self.in_order = in_order
        self.stopped.set()
        for thread in self.threads:
            # One that is still inside the store when the interpreter ends would abort the process.
            thread.join(self.limit_s)
        self.neighbour.close()

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _wait(self) -> bool:
        """Wait until the next beat; returns whether the block has ended."""
        end = time.monotonic() + self.interval_s
        while not (over := self.stopped.wait(min(HURRIED_S, self.interval_s))):
            if told_to_stop() or time.monotonic() >= end or self.neighbour.lost():
                break
        return over

    def _beat(self) -> None:
        """Beat and listen until the block ends; a store that fails is left to `_watch`."""
        count = 0
        with suppress(RuntimeError):
            self._look()  # without delay: a rank that was never reached is not reported
        while not self._wait():
            count += 1
            try:
                self.store.set(self._key(str(self.rank)), str(count))
                lost = self._told() or self._listen() or self._look()
            except RuntimeError:
                continue
            self.answered = time.monotonic()
            if lost and not self.stopped.is_set():
                self._end(lost)
        with suppress(RuntimeError):  # the store's process has left first
            self.neighbour.leave(self.in_order)

    def _told(self) -> str:
        """The message of another rank that has found one lost."""
        key = self._key(LOST)
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _look(self) -> str:
        """Tell all ranks if the neighbour is gone; returns that message."""
        told = told_to_stop()
        if not self.neighbour.gone(at_once=told) or self.stopped.is_set():
            return ""
        why = "told to stop, and " if told else ""
        text = f"{why}{self._named([self.neighbour.rank])} is gone: ending without saving"
        self.store.set(self._key(LOST), text)
        return text

    def _listen(self) -> str:
        """Note which ranks have beaten since the last time; returns a message on those silent for too long."""
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
        return f"no sign of life for {self.limit_s:g} s from {self._named(silent)}: the host or its network is down"

    def _named(self, peers: list[int]) -> str:
        """Ranks with their hosts, as text."""
        hosts: dict[str, list[int]] = {}
        for peer in peers:
            hosts.setdefault(self.store.get(self._key(f"host/{peer}")).decode(), []).append(peer)
        return "; ".join(f"{_ranks(peers)} on host {host}" for host, peers in hosts.items())

    def _watch(self) -> None:
        """End the process when the store has not answered for too long."""
        misses, answered = 0, self.answered
        while not self._wait():
            misses, answered = (misses + 1 if self.answered == answered else 0), self.answered
            silence = time.monotonic() - answered
            if silence > self.limit_s or (told_to_stop() and misses >= MISSES):
                self._end(
                    f"host {socket.gethostname()} has not reached the first rank's host ({self.address}) for "
                    f"{silence:.0f} s: this host or that one is cut off from the network"
                )

    def _end(self, text: str) -> None:
        """End at once: the main thread waits inside a collective and cannot be told."""
        text = f"rank {self.rank}: {text}"
        print(f"flm train: {text}", file=sys.stderr, flush=True)
        write_error_file(text, 1)
        if self.rank == 0:
            # The store may live in this process; let the others read first.
            time.sleep(2 * (HURRIED_S if told_to_stop() else self.interval_s))
        os._exit(1)


def _ranks(peers: list[int]) -> str:
    return f"rank {peers[0]}" if len(peers) == 1 else f"ranks {', '.join(map(str, peers))}"
