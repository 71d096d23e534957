"""The blobs of a host agent, in anonymous memory that is freed when the last process closes it.

A blob is one rank's shard of one generation. It is listed only when it is filled and its checksums are known. Memory is
reused from generation to generation: touching pages for the first time makes a copy several times slower.
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
from typing import NamedTuple

from flm_megatron.checkpoint.memory.wire import checksums
from flm_megatron.errors import FlmError
from flm_megatron.json_text import JsonObject

POPULATE_WRITE = 23  # Linux 5.14; mmap has no name for it
TOUCHED = 64 * 2**20
CHECKS = 8
_numbers = itertools.count()


class Generation(NamedTuple):
    """One refresh of all ranks: the number of the job's start, and of the refresh since. Later ones compare greater."""

    start: int
    number: int


NONE = Generation(0, 0)


class Buffer:
    """Anonymous shared memory: `fd` can be passed to another process of this host, `view` are its bytes here."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError if the system has not enough memory."""
        self.nbytes = nbytes
        self.number = next(_numbers)
        """Its name for other processes."""
        self.fd = os.memfd_create("flm-copy", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, nbytes)
        self._mapped = mmap.mmap(self.fd, nbytes)
        self.view = memoryview(self._mapped)

    def touch(self) -> None:
        """Allocate all pages now, not one by one while training waits; older kernels cannot."""
        with suppress(OSError):
            for start in range(0, self.nbytes, TOUCHED):
                self._mapped.madvise(POPULATE_WRITE, start, min(TOUCHED, self.nbytes - start))

    def close(self) -> None:
        """Close it; the memory is free when nobody maps it any more."""
        os.close(self.fd)


@dataclass(eq=False)
class Blob:
    """`nbytes` of a buffer with the state of `rank`; `own` if that rank is on this host."""

    generation: Generation
    rank: int
    own: bool
    nbytes: int
    buffer: Buffer
    header: JsonObject = field(default_factory=dict)
    """Description of the bytes, as JSON."""
    crcs: list[int] = field(default_factory=list)
    """CRC-32 of each block."""

    @property
    def data(self) -> memoryview:
        """The stored bytes, without the rest of the buffer."""
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
        """Allocate a buffer for each of `sizes` bytes, as far as the budget allows, and touch its pages.

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
        """Memory for a blob that is about to be filled. Drops every blob but those of `generation` and `keep`.

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

    def finish(self, blob: Blob, header: JsonObject, crcs: list[int]) -> None:
        """List a blob that is filled. Raises FlmError if a newer generation has begun meanwhile."""
        with self._lock:
            self._filling.remove(blob)
            if blob.generation < self.newest:
                self._free.append(blob.buffer)
                raise FlmError(f"generation {tuple(blob.generation)} was overtaken by {tuple(self.newest)}")
            blob.header, blob.crcs = header, crcs
            self._whole[blob.generation, blob.rank, blob.own] = blob

    def abandon(self, blob: Blob) -> None:
        """Take back the memory of a blob that could not be filled."""
        with self._lock:
            if blob in self._filling:
                self._filling.remove(blob)
                self._free.append(blob.buffer)

    def whole(self) -> list[Blob]:
        """All listed blobs."""
        with self._lock:
            return list(self._whole.values())

    def find(self, generation: Generation, rank: int) -> Blob:
        """The blob of a rank. Raises FlmError if there is none."""
        for own in (True, False):
            blob = self._whole.get((generation, rank, own))
            if blob is not None:
                return blob
        raise FlmError(f"no copy of rank {rank} of generation {tuple(generation)} is held here")

    def checked(self) -> list[Blob]:
        """Listed blobs whose checksums still match; others are dropped."""
        blobs = self.whole()
        with ThreadPoolExecutor(CHECKS) as executor:
            right = list(executor.map(lambda blob: checksums(blob.data) == blob.crcs, blobs))
        with self._lock:
            for blob in itertools.compress(blobs, map(operator.not_, right)):
                if self._whole.pop((blob.generation, blob.rank, blob.own), None) is not None:
                    self._free.append(blob.buffer)
        return list(itertools.compress(blobs, right))

    def live(self) -> list[int]:
        """The numbers of all buffers in use or kept for reuse."""
        with self._lock:
            return [buffer.number for buffer in self._buffers()]

    def _buffers(self) -> list[Buffer]:
        return [*self._free, *(blob.buffer for blob in (*self._whole.values(), *self._filling))]

    def _take(self, size: int) -> Buffer:
        """A free buffer of the size, or a new one; free ones are closed if the budget needs it."""
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
