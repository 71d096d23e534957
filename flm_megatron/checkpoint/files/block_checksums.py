"""CRC-32 of every block of a file: computed while it is written, checked while it is read.

Beside a checkpoint's `X.distcp` is `X.distcp.crc32`: the CRC-32 of each MiB of X, as little-endian uint32. A checksum
of the whole file reports damage only after all of it was read; these check just the bytes that a reader wants, before
it gets them and without a second pass.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from isal.isal_zlib import crc32, crc32_combine

from flm_megatron.errors import DamagedError
from flm_megatron.storage.reading import ObjectFile

BLOCK = 2**20
SUFFIX = ".crc32"
KEPT_BLOCKS = 32  # of all files, for reads that begin in a block where an earlier one ended
CHECK_BYTES = 2**20
LARGEST_READ = 2**30  # not every system takes more at once

Source = int | ObjectFile
"""What bytes are read through: the descriptor of an open file, or an open object."""
Fragment = tuple[int, int]
"""CRC-32 and number of bytes of a run that lies in one block."""


def fragments(data: memoryview, position: int) -> list[Fragment]:
    """`data`, which lies at `position` of its file, cut at block boundaries."""
    return [(crc32(data[a:b]), b - a) for a, b in _cuts(position, data.nbytes)]


def combined(parts: Iterable[Fragment]) -> Fragment:
    """The CRC-32 and size of runs that lie one after the other."""
    crc, size = 0, 0
    for part_crc, part_size in parts:
        crc, size = crc32_combine(crc, part_crc, part_size), size + part_size
    return crc, size


def _cuts(position: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Starts and ends, relative to `position`, of a run's bytes in each block."""
    start = 0
    while start < nbytes:
        end = min(nbytes, start + BLOCK - (position + start) % BLOCK)
        yield start, end
        start = end


class BlockSums:
    """The checksums of a file's blocks, from fragments that are added in the order of the file."""

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._open: list[Fragment] = []
        self._filled = 0

    def add(self, parts: Iterable[Fragment]) -> None:
        """Append `parts`, cut at the file's block boundaries."""
        for part in parts:
            self._open.append(part)
            self._filled += part[1]
            assert self._filled <= BLOCK, "a fragment lies in two blocks"
            if self._filled == BLOCK:
                self._close()

    def to_bytes(self) -> bytes:
        """The content of the checksum file; the last block may be shorter than the others."""
        if self._filled:
            self._close()
        return np.array(self._blocks, "<u4").tobytes()

    def _close(self) -> None:
        self._blocks.append(combined(self._open)[0])
        self._open, self._filled = [], 0


class KeptBlocks:
    """A cache of checked blocks that were wanted only in part, least recently used first out; for any number of
    threads."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[Path, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, block: int) -> np.ndarray | None:
        """A block of a file, if it is kept."""
        with self._lock:
            if (path, block) in self._blocks:
                self._blocks.move_to_end((path, block))
            return self._blocks.get((path, block))

    def keep(self, path: Path, block: int, data: np.ndarray) -> None:
        """Keep a block, in place of the least recently used one."""
        with self._lock:
            self._blocks[path, block] = data
            if len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)


class CheckedFile:
    """A file of `size` bytes with the checksums of its blocks. Threads may read at the same time.

    Files that are read together share their `kept` blocks. Raises DamagedError if `sums`, the content of its checksum
    file, is not for that many blocks.
    """

    def __init__(self, path: Path, size: int, sums: bytes, kept: KeptBlocks | None = None) -> None:
        if len(sums) != 4 * -(-size // BLOCK):
            raise DamagedError(f"{path}{SUFFIX}: holds {len(sums) // 4} checksums for a file of {size} bytes")
        self.path, self.size = path, size
        self._sums = np.frombuffer(sums, "<u4")
        self._kept = kept or KeptBlocks()

    def read_into(self, fd: Source, out: memoryview, position: int) -> None:
        """Fill `out` with the bytes from `position` on, through the open `fd`.

        Whole blocks are read into place; a first or last block that `out` wants only in part is read whole. Raises
        DamagedError, naming the file and the place, when bytes have changed since they were written.
        """
        if isinstance(fd, ObjectFile):
            fd.expect(-(-(position + out.nbytes) // BLOCK) * BLOCK)  # to the end of the last block
        for start, end in _cuts(position, out.nbytes):
            block, inside = divmod(position + start, BLOCK)
            length = min(BLOCK, self.size - block * BLOCK)
            if end - start == length:
                self._read_block(fd, block, out[start:end])
            else:
                out[start:end] = self._part_of(fd, block, length)[inside : inside + end - start]

    def _part_of(self, fd: Source, block: int, length: int) -> memoryview:
        """A checked block of which only a part is wanted, cached for the next read."""
        data = self._kept.get(self.path, block)
        if data is None:
            data = np.empty(length, np.uint8)
            self._read_block(fd, block, data.data)
            self._kept.keep(self.path, block, data)
        return data.data

    def _read_block(self, fd: Source, block: int, out: memoryview) -> None:
        read_fully(fd, out, block * BLOCK, self.path)
        if (found := crc32(out)) != self._sums[block]:
            raise DamagedError(_changed(self.path, out.nbytes, block * BLOCK, found, self._sums[block]))


class CheckedRun:
    """Bytes of a file with one checksum, which are read through once when any of them is wanted."""

    def __init__(self, path: Path, offset: int, nbytes: int, crc: int) -> None:
        self.path, self.offset, self.nbytes, self.crc = path, offset, nbytes, crc
        self._lock, self._checked = threading.Lock(), False

    def read_into(self, fd: Source, out: memoryview, position: int) -> None:
        """Fill `out` with the bytes from `position` of the file on. Raises as `check`."""
        self.check(fd)
        if isinstance(fd, ObjectFile):
            fd.expect(position + out.nbytes)
        read_fully(fd, out, position, self.path)

    def check(self, fd: Source) -> None:
        """Raise DamagedError, naming the file and the place, if the bytes have changed since they were written."""
        with self._lock:
            if self._checked:
                return
            if isinstance(fd, ObjectFile):
                fd.expect(self.offset + self.nbytes)
            crc, buffer = 0, memoryview(bytearray(min(CHECK_BYTES, max(1, self.nbytes))))
            for start in range(0, self.nbytes, len(buffer)):
                part = buffer[: self.nbytes - start]
                read_fully(fd, part, self.offset + start, self.path)
                crc = crc32(part, crc)
            if crc != self.crc:
                raise DamagedError(_changed(self.path, self.nbytes, self.offset, crc, self.crc))
            self._checked = True


def _changed(path: Path, nbytes: int, position: int, found: int, wanted: int) -> str:
    return (
        f"{path}: the {nbytes} bytes from byte {position} on have checksum {found:08x} instead of {wanted:08x}: "
        "they have changed since they were written"
    )


def source_of(file: IO[bytes]) -> Source:
    """What to read an open, unbuffered file or object through."""
    return file if isinstance(file, ObjectFile) else file.fileno()


def size_of(source: Source) -> int:
    """Its bytes."""
    return os.fstat(source).st_size if isinstance(source, int) else source.size


def read_fully(fd: Source, out: memoryview, position: int, path: Path) -> None:
    """Fill `out` from `position` of an open file on. Raises DamagedError, naming `path`, where the file ends before."""
    while out.nbytes:
        count = os.preadv(fd, [out[:LARGEST_READ]], position) if isinstance(fd, int) else fd.read_at(out, position)
        if not count:
            raise DamagedError(f"{path}: the file ends before its data does (truncated?)")
        out, position = out[count:], position + count
