"""An object as a file that is open for reading: what is wanted is fetched in a few large ranges at a time."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flm_megatron.storage import store

RANGE, LEAST = 8 * 2**20, 2**18
"""Bytes of a request at most, and at least where the object has as many."""
AT_ONCE = 4
"""Requests at a time for one file."""


class ObjectFile(io.RawIOBase):
    """Reads an object of which nothing is on this machine. For one thread.

    Raises:
        FileNotFoundError: there is no such object.
        RequestError: the store fails.
    """

    def __init__(self, url: str) -> None:
        found = store.info(url)
        if found is None:
            raise FileNotFoundError(f"{url} is not there")
        self.name, self.size = url, found.size
        self._position, self._start, self._held, self._end = 0, 0, b"", 0

    def expect(self, stop: int) -> None:
        """Say that all bytes up to `stop` are wanted next, one after the other: they are fetched together."""
        self._end = min(stop, self.size)

    def read_at(self, out: memoryview, position: int) -> int:
        """Fill the beginning of `out` from `position` on; returns how many bytes, 0 at the end."""
        offset = position - self._start
        if not 0 <= offset < len(self._held):
            stop = min(self.size, max(position + max(out.nbytes, LEAST), self._end), position + RANGE * AT_ONCE)
            self._start, offset = position, 0
            self._held = self._fetched(position, stop)
        part = memoryview(self._held)[offset : offset + out.nbytes]
        out[: part.nbytes] = part
        return part.nbytes

    def _fetched(self, start: int, stop: int) -> bytes:
        cuts = range(start, stop, RANGE)
        if len(cuts) <= 1:
            return store.read_range(self.name, start, max(start, stop))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return b"".join(pool.map(lambda cut: store.read_range(self.name, cut, min(cut + RANGE, stop)), cuts))

    def readinto(self, buffer: Any) -> int:
        """As a file does."""
        out = memoryview(buffer).cast("B")
        count = self.read_at(out, self._position) if out.nbytes else 0
        self._position += count
        return count

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Position."""
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Move; returns the new position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, start + position)
        return self._position
