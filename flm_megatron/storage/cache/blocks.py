"""A large object of which ranges are read: in blocks that are kept on this machine, and fetched before they are needed.

A block is a file that appears under its name when all of its bytes are on the disk. What was fetched is kept or handed
out only after the store said that the object is still the one that was opened, so blocks of two versions never meet.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.storage.cache.place import BLOCKS, FOLDER_VARIABLE, cache_root, entry_folder, used, wrote
from flm_megatron.storage.store import ObjectInfo, read_range, require_unchanged
from flm_megatron.url import shown

BLOCK = 4 * 2**20
WORKERS = 8
MOST_WAITING = 64
"""Blocks that may wait to be fetched ahead; what is wanted beyond them is fetched when it is read."""
LOCKS = 256


class BlockReader:
    """Bytes of one version of an object."""

    def __init__(self, found: ObjectInfo) -> None:
        self.found = found
        self._folder = entry_folder(BLOCKS, found)
        self._waiting: set[int] = set()
        self._turn = threading.Lock()
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._keeps = True

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), which lie within the object.

        Raises:
            RequestError: the store fails to the end, or the object was changed or removed.
        """
        assert 0 <= start <= stop <= self.found.size
        parts = []
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            first = number * BLOCK
            parts.append(self._read(number, max(start - first, 0), min(stop - first, BLOCK)))
        return b"".join(parts)

    def want(self, start: int, stop: int) -> None:
        """Fetch in the background what of [start, stop) is not here. Failures are left to whoever reads it."""
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            with self._turn:
                if number in self._waiting or len(self._waiting) >= MOST_WAITING or self._path(number).exists():
                    continue
                self._waiting.add(number)
                self._asked.put(number)
                if not self._workers:
                    self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]
                    for worker in self._workers:
                        worker.start()

    def close(self) -> None:
        """End the workers after what they have begun. They end with the process too, wherever they stand."""
        for _ in self._workers:
            self._asked.put(None)

    def _work(self) -> None:
        while (number := self._asked.get()) is not None:
            try:
                self._fetched(number)
            except RequestError:
                continue
            finally:
                with self._turn:
                    self._waiting.discard(number)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _size(self, number: int) -> int:
        return min(BLOCK, self.found.size - number * BLOCK)

    def _read(self, number: int, start: int, stop: int) -> bytes:
        """Bytes of a block, from here or from the store."""
        kept = self._kept(number, start, stop)
        return self._fetched(number)[start:stop] if kept is None else kept

    def _kept(self, number: int, start: int, stop: int) -> bytes | None:
        """Bytes of a block that is here; none if it is not, or not whole."""
        path = self._path(number)
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != self._size(number):
                    return None
                data = os.pread(file.fileno(), stop - start, start)
        except OSError:
            return None
        used(path)
        return data if len(data) == stop - start else None

    def _fetched(self, number: int) -> bytes:
        """A block, fetched unless another process or thread has done so meanwhile."""
        from filelock import FileLock

        try:
            lock = FileLock(self._folder / f".{number % LOCKS:03d}.lock")
            lock.acquire()
        except OSError:  # a disk that is full or does not lock: then each fetches for itself
            return self._from_store(number)
        try:
            kept = self._kept(number, 0, self._size(number))
            return self._from_store(number) if kept is None else kept
        finally:
            lock.release()

    def _from_store(self, number: int) -> bytes:
        start = number * BLOCK
        try:
            data = read_range(self.found.url, start, start + self._size(number))
        except FileNotFoundError:
            raise RequestError(f"{shown(self.found.url)} was removed while it was read: bring it back") from None
        require_unchanged(self.found)
        self._keep(number, data)
        return data

    def _keep(self, number: int, data: bytes) -> None:
        """Put a block into the cache; a disk that does not take it costs time alone, and is said once."""
        path = self._path(number)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            wrote(len(data))
        except OSError as error:
            partial.unlink(missing_ok=True)
            if self._keeps:
                self._keeps = False
                print(
                    f"WARNING: the cache {cache_root()} takes no more ({error.strerror}): data is fetched at every "
                    f"use; set {FOLDER_VARIABLE} to a folder with room",
                    file=sys.stderr,
                    flush=True,
                )
