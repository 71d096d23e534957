"""Records the changes that this process makes to the files of a folder, by standing in for the calls that make them.

It sees what Python code does through `os` and `open`; C++ that writes files by itself (`torch.save` to a path) it does
not see. `strace_recorder` sees everything, and is held against this one where `strace` is installed.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unittest import mock

from tests.crash.events import Event, MakeFolder, Open, Remove, Rename, Resize, SyncBegins, SyncEnds, Write

WRITING = os.O_WRONLY | os.O_RDWR
TMPFILE = getattr(os, "O_TMPFILE", -1)


class PythonRecorder:
    """Inside a `with`, `events` grows by what is done to files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.events: list[Event] = []
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._offsets: dict[int, int | None] = {}

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """Stand in for the calls while the block runs."""
        names = "open close write pwrite fsync fdatasync rename replace mkdir unlink remove rmdir truncate ftruncate"
        patches = [mock.patch.object(os, name, self._instead(name)) for name in names.split()]
        patches += [mock.patch.object(module, "open", self._open_file) for module in (io, builtins)]
        for patch in patches:
            patch.start()
        try:
            yield self.events
        finally:
            for patch in patches:
                patch.stop()

    def _instead(self, name: str) -> Callable[..., Any]:
        original, handler = getattr(os, name), getattr(self, f"_{name}", None)
        return (lambda *a, **k: handler(original, *a, **k)) if handler else original

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """A path relative to the root; none for what lies elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        head, name = os.path.split(os.path.abspath(path))
        path = os.path.join(os.path.realpath(head), name)
        if path == self.root:
            return ""
        return path[len(self.root) + 1 :] if path.startswith(self.root + "/") else None

    def add(self, event: Event) -> None:
        """One more event."""
        with self._lock:
            self.events.append(event)

    def _open(self, original: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        nameless = flags & TMPFILE == TMPFILE  # nothing of it can stay
        found = self.inside(path, dir_fd) if flags & WRITING and not nameless else None
        descriptor = original(path, flags, mode, dir_fd=dir_fd)
        if found is not None:
            self.add(Open(found, bool(flags & os.O_TRUNC)))
            self._offsets[descriptor] = None if flags & os.O_APPEND else 0
        return descriptor

    def _close(self, original: Any, descriptor: int) -> None:
        self._offsets.pop(descriptor, None)
        original(descriptor)

    def _write(self, original: Any, descriptor: int, data: Any) -> int:
        count = original(descriptor, data)
        if descriptor in self._offsets:
            offset = self._offsets[descriptor]
            self.add(Write(self._known(descriptor), offset, bytes(memoryview(data).cast("B")[:count])))
            self._offsets[descriptor] = None if offset is None else offset + count
        return count

    def _pwrite(self, original: Any, descriptor: int, data: Any, offset: int) -> int:
        count = original(descriptor, data, offset)
        if descriptor in self._offsets:
            self.add(Write(self._known(descriptor), offset, bytes(memoryview(data).cast("B")[:count])))
        return count

    def _known(self, descriptor: int) -> str:
        path = self.inside(descriptor)
        assert path is not None
        return path

    def _fsync(self, original: Any, descriptor: int) -> None:
        number, path = next(self._numbers), self.inside(descriptor)
        if path is not None:
            self.add(SyncBegins(path, number))
        original(descriptor)
        if path is not None:
            self.add(SyncEnds(number))

    _fdatasync = _fsync

    def _rename(self, original: Any, source: Any, target: Any, **kwargs: Any) -> None:
        old, new = self.inside(source), self.inside(target)
        assert (old is None) == (new is None), f"{source} -> {target} leaves the folder that is recorded"
        original(source, target, **kwargs)
        if old is not None and new is not None:
            self.add(Rename(old, new))

    _replace = _rename

    def _mkdir(self, original: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        found = self.inside(path, dir_fd)
        original(path, mode, dir_fd=dir_fd)
        if found is not None:
            self.add(MakeFolder(found))

    def _remove(self, original: Any, path: Any, *, dir_fd: int | None = None) -> None:
        found = self.inside(path, dir_fd)
        original(path, dir_fd=dir_fd)
        if found is not None:
            self.add(Remove(found))

    _unlink = _rmdir = _remove

    def _truncate(self, original: Any, path: Any, size: int) -> None:
        found = self.inside(path)
        original(path, size)
        if found is not None:
            self.add(Resize(found, size))

    _ftruncate = _truncate

    def _open_file(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> IO[Any]:
        """In the place of `open`."""
        known = isinstance(file, int) or kwargs.get("opener") is not None  # `os.open` has seen it
        if known or not set(mode) & set("wax+") or self.inside(file) is None:
            return _OPEN(file, mode, buffering, *args, **kwargs)
        raw = _RecordedFile(self, file, mode.replace("b", "").replace("t", ""))
        if "b" in mode and buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)


_OPEN = io.open


class _RecordedFile(io.FileIO):
    """A file whose writes are recorded."""

    def __init__(self, recorder: PythonRecorder, path: Any, mode: str) -> None:
        self._recorder, self._append = recorder, "a" in mode
        inside = recorder.inside(path)
        assert inside is not None
        super().__init__(path, mode)
        recorder.add(Open(inside, "w" in mode))

    def write(self, data: Any) -> int:
        """Write, and say so."""
        offset = None if self._append else self.tell()
        count = super().write(data)
        self._recorder.add(
            Write(self._recorder._known(self.fileno()), offset, bytes(memoryview(data).cast("B")[:count]))
        )
        return count

    def truncate(self, size: int | None = None) -> int:
        """Cut or fill, and say so."""
        size = super().truncate(size)
        self._recorder.add(Resize(self._recorder._known(self.fileno()), size))
        return size
