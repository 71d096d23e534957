"""What a host agent holds: blobs in memory that no file names, so that it is free when the last process lets go.

A blob is one rank's shard of one generation. While it is filled it is nowhere listed; it is listed once its checksums
are known. Memory is taken over from generation to generation: pages that are touched for the first time make a copy
several times slower.
"""

from __future__ import annotations

import itertools
import mmap
import operator
import os
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flm_megatron.checkpoint.memory.wire import checksums
from flm_megatron.errors import FlmError

POPULATE_WRITE = 23  # Linux 5.14; mmap has no name for it
TOUCHED = 64 * 2**20
CHECKS = 8
_numbers = itertools.count()


class Generation(NamedTuple):
    """One refresh of all ranks: which start of the job's ranks, and which refresh since. Later ones compare greater."""

    start: int
    number: int


NONE = Generation(0, 0)


class Buffer:
    """Anonymous shared memory: `fd` can be handed to another process of this host, `checkpoint` are its bytes here."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError when the system has not that much."""
        self.nbytes = nbytes
        self.number = next(_numbers)
        """Its name for other processes."""
        self.fd = os.memfd_create("flm-copy", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, nbytes)
        self._mapped = mmap.mmap(self.fd, nbytes)
        self.view = memoryview(self._mapped)

    def touch(self) -> None:
        """Have the system give all pages now, not one by one while training waits; older ones cannot."""
        with suppress(OSError):
            for start in range(0, self.nbytes, TOUCHED):
                self._mapped.madvise(POPULATE_WRITE, start, min(TOUCHED, self.nbytes - start))

    def close(self) -> None:
        """Let go; the memory is free when nobody maps it any more."""
        os.close(self.fd)


@dataclass(eq=False)
class Blob:
    """`nbytes` of a buffer with the state of `rank`; `own` tells a rank of this host from one of another."""

    generation: Generation
    rank: int
    own: bool
    nbytes: int
    buffer: Buffer
    header: dict[str, Any] = field(default_factory=dict)
    """What the bytes are, as JSON."""
    crcs: list[int] = field(default_factory=list)
    """CRC-32 of each block."""

    @property
    def data(self) -> memoryview:
        """What was stored, without the rest of the buffer that it lies in."""
        return self.buffer.view[: self.nbytes]


class Blobs:
    """All blobs of one host, at most `budget` bytes; used by several threads."""

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget
        self.newest = NONE
        """Newest generation that was begun."""
        self._whole: dict[tuple[Generation, int, bool], Blob] = {}
        self._filling: list[Blob] = []
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes held, in use or not."""
        return sum(buffer.nbytes for buffer in self._buffers())

    def reserve(self, sizes: Iterable[int]) -> None:
        """Have a buffer for each of `sizes` bytes, as far as the budget goes, its pages touched.

        Raises:
            FlmError: the host's memory does not allow it.
        """
        with self._lock:
            missing = Counter(map(_rounded, sizes)) - Counter(buffer.nbytes for buffer in self._buffers())
        for size in missing.elements():
            if self.held + size > self.budget:
                return
            buffer = _new_buffer(size)
            buffer.touch()
            with self._lock:
                self._free.append(buffer)

    def begin(self, generation: Generation, keep: Generation, rank: int, own: bool, nbytes: int) -> Blob:
        """Memory for a blob that is about to be filled. Every blob but those of `generation` and `keep` is dropped.

        Raises:
            FlmError: a newer generation has begun, or the budget or the host's memory does not allow it.
        """
        with self._lock:
            if generation < self.newest or nbytes < 0:
                raise FlmError(
                    f"{nbytes} bytes of {tuple(generation)} are offered after {tuple(self.newest)} has begun"
                )
            self.newest = generation
            for key in [k for k in self._whole if k[0] not in (generation, keep) or k == (generation, rank, own)]:
                self._free.append(self._whole.pop(key).buffer)
            blob = Blob(generation, rank, own, nbytes, self._take(_rounded(nbytes)))
            self._filling.append(blob)
            return blob

    def finish(self, blob: Blob, header: dict[str, Any], crcs: list[int]) -> None:
        """List a blob that is filled. Raises FlmError for one that a newer generation has overtaken."""
        with self._lock:
            self._filling.remove(blob)
            if blob.generation < self.newest:
                self._free.append(blob.buffer)
                raise FlmError(f"generation {tuple(blob.generation)} was overtaken by {tuple(self.newest)}")
            blob.header, blob.crcs = header, crcs
            self._whole[blob.generation, blob.rank, blob.own] = blob

    def abandon(self, blob: Blob) -> None:
        """Take the memory of a blob back whose filling has failed."""
        with self._lock:
            if blob in self._filling:
                self._filling.remove(blob)
                self._free.append(blob.buffer)

    def whole(self) -> list[Blob]:
        """All listed blobs."""
        with self._lock:
            return list(self._whole.values())

    def find(self, generation: Generation, rank: int) -> Blob:
        """The blob of a rank. Raises FlmError where it is not held."""
        for own in (True, False):
            blob = self._whole.get((generation, rank, own))
            if blob is not None:
                return blob
        raise FlmError(f"no copy of rank {rank} of generation {tuple(generation)} is held here")

    def checked(self) -> list[Blob]:
        """Listed blobs that still have their checksums; those that have not are dropped."""
        blobs = self.whole()
        with ThreadPoolExecutor(CHECKS) as executor:
            right = list(executor.map(lambda blob: checksums(blob.data) == blob.crcs, blobs))
        with self._lock:
            for blob in itertools.compress(blobs, map(operator.not_, right)):
                if self._whole.pop((blob.generation, blob.rank, blob.own), None) is not None:
                    self._free.append(blob.buffer)
        return list(itertools.compress(blobs, right))

    def live(self) -> list[int]:
        """The numbers of all buffers that are held."""
        with self._lock:
            return [buffer.number for buffer in self._buffers()]

    def _buffers(self) -> list[Buffer]:
        return [*self._free, *(blob.buffer for blob in (*self._whole.values(), *self._filling))]

    def _take(self, size: int) -> Buffer:
        """A free buffer of the size, or a new one; free ones of other sizes make room for it."""
        for buffer in self._free:
            if buffer.nbytes == size:
                self._free.remove(buffer)
                return buffer
        while self._free and self.held + size > self.budget:
            self._free.pop().close()
        if self.held + size > self.budget:
            raise FlmError(f"{size} bytes more than the {self.held} held are beyond the budget of {self.budget} bytes")
        return _new_buffer(size)


def _rounded(nbytes: int) -> int:
    """Whole pages, at least one."""
    return max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE


def _new_buffer(size: int) -> Buffer:
    try:
        return Buffer(size)
    except OSError as error:
        raise FlmError(f"the host has no {size} bytes for another copy: {error.strerror or error}") from error
