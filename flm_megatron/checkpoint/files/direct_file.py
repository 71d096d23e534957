"""A new file that several threads fill, bypassing the page cache where that is faster."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np

PAGE = mmap.PAGESIZE  # 64 KiB on some machines: a page that the cache also holds may not be written past it
SMALLEST_DIRECT, BUFFER = 2**20, 8 * 2**20


class DirectFile:
    """A file opened for writing at any position; closed at the end of a `with`, after an fsync if there was no error.

    Whole pages of data of 1 MiB and more go straight to the disk: that saves the copy into the page cache, which would
    displace what training keeps there. Split pages and small data go through the page cache, and so does everything on
    file systems without direct writes or that refuse them (a device of larger blocks). Methods raise OSError as
    `os.pwrite` does.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = _open_direct(path)
        self._refused = False
        self._buffers = threading.local()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
        finally:
            for descriptor in (self._fd, self._direct):
                if descriptor is not None:
                    os.close(descriptor)

    def write(self, data: memoryview, position: int) -> None:
        """Write bytes from `position` on; threads may write at the same time."""
        lead = -position % PAGE
        whole = (data.nbytes - lead) // PAGE * PAGE
        if self._direct is not None and whole >= SMALLEST_DIRECT:
            write_at(self._fd, data[:lead], position)
            data, position = data[lead:], position + lead
            for start in range(0, whole, BUFFER):
                self._write_pages(self._direct, data[start : min(start + BUFFER, whole)], position + start)
            data, position = data[whole:], position + whole
        write_at(self._fd, data, position)

    def _write_pages(self, direct: int, data: memoryview, position: int) -> None:
        """Write whole pages past the page cache; through it once the system has refused."""
        if not self._refused:
            try:
                return write_at(direct, self._aligned(data), position)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._refused = True
        write_at(self._fd, data, position)

    def _aligned(self, data: memoryview) -> memoryview:
        """A copy of at most BUFFER bytes that begins at a page; valid until the same thread's next call."""
        if not hasattr(self._buffers, "page"):
            self._buffers.page = mmap.mmap(-1, BUFFER)
        buffer = np.frombuffer(self._buffers.page, np.uint8, data.nbytes)
        np.copyto(buffer, np.frombuffer(data, np.uint8))
        return buffer.data


def _open_direct(path: Path) -> int | None:
    """A descriptor for direct writes; none if the system or the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def write_at(fd: int, data: memoryview, position: int) -> None:
    """Write all bytes from `position` on. Raises OSError as `os.pwrite` does."""
    while data.nbytes:
        count = os.pwrite(fd, data[: 1 << 30], position)  # not every system takes more at once
        data, position = data[count:], position + count
