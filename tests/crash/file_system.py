"""A file system that promises what POSIX does, and no more, about what outlives a power cut.

- What a completed fsync of a file covered is on the disk. Of what came later each write may be there or not, whole or
  in part, and the file may have any size it went through.
- What a completed fsync of a folder covered is on the disk. Of the later changes of its entries (made, removed,
  renamed) each may be there or not, whatever happens to the others, and also to those of other folders; a rename
  inside one folder is there as a whole or not at all, one from folder to folder in each of the two or not.
- The fsync of a file says nothing about its name, that of a folder nothing about the folders and files in it.

That is weaker than any file system in use: ext4, XFS and Lustre keep the order of changes of entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.events import (
    Event,
    MakeFolder,
    Mark,
    Open,
    Remove,
    Rename,
    Resize,
    SyncBegins,
    SyncEnds,
    Write,
)

DataChange = Write | Resize


@dataclass
class File:
    """A file whatever its name: `durable` is on the disk, `pending` came later, each with its number."""

    durable: bytes = b""
    pending: list[tuple[int, DataChange]] = field(default_factory=list)

    def content(self) -> bytes:
        """What a program reads now."""
        return applied(self.durable, [change for _, change in self.pending])

    def settle(self, number: int) -> None:
        """Changes before `number` are on the disk."""
        self.durable = applied(self.durable, [change for at, change in self.pending if at < number])
        self.pending = [(at, change) for at, change in self.pending if at >= number]


Entries = dict[str, "File | Folder"]
EntryChange = dict[str, "File | Folder | None"]


@dataclass
class Folder:
    """A folder: the entries on the disk, and later changes of them, each of one or two names and whole or not."""

    durable: Entries = field(default_factory=dict)
    pending: list[tuple[int, EntryChange]] = field(default_factory=list)

    def entries(self) -> Entries:
        """What a program sees now."""
        return changed(self.durable, [change for _, change in self.pending])

    def settle(self, number: int) -> None:
        """Changes before `number` are on the disk."""
        self.durable = changed(self.durable, [change for at, change in self.pending if at < number])
        self.pending = [(at, change) for at, change in self.pending if at >= number]


def applied(data: bytes, changes: list[DataChange]) -> bytes:
    """A file's bytes after some changes."""
    if not changes:
        return data
    out = bytearray(data)
    for change in changes:
        end = change.size if isinstance(change, Resize) else _start(change, out) + len(change.data)
        out.extend(bytes(max(0, end - len(out))))
        if isinstance(change, Resize):
            del out[end:]
        else:
            out[end - len(change.data) : end] = change.data
    return bytes(out)


def _start(write: Write, data: bytearray) -> int:
    return len(data) if write.offset is None else write.offset


def changed(entries: Entries, changes: list[EntryChange]) -> Entries:
    """A folder's entries after some changes."""
    out = dict(entries)
    for change in changes:
        for name, node in change.items():
            if node is None:
                out.pop(name, None)
            else:
                out[name] = node
    return out


class FileSystem:
    """Begins as `folder` is now, all of it on the disk, and takes events."""

    def __init__(self, folder: Path) -> None:
        self.root = _snapshot(folder)
        self._number = 0
        self._syncs: dict[int, tuple[File | Folder, int]] = {}

    def apply(self, event: Event) -> None:
        """Play one event."""
        self._number += 1
        if isinstance(event, Open):
            self._open(event)
        elif isinstance(event, Write | Resize):
            self._file(event.path).pending.append((self._number, self._placed(event)))
        elif isinstance(event, MakeFolder):
            self._change(event.path, Folder())
        elif isinstance(event, Remove):
            self._change(event.path, None)
        elif isinstance(event, Rename):
            self._rename(event)
        elif isinstance(event, SyncBegins):
            self._syncs[event.number] = (self.find(event.path), self._number)
        elif isinstance(event, SyncEnds):
            node, number = self._syncs.pop(event.number)
            node.settle(number)
        else:
            assert isinstance(event, Mark), event

    def find(self, path: str) -> File | Folder:
        """The file or folder that a program finds at a path."""
        node: File | Folder = self.root
        for name in path.split("/") if path else ():
            assert isinstance(node, Folder), f"{path}: {name} lies in a file"
            node = node.entries()[name]
        return node

    def exists(self, path: str) -> bool:
        """Whether a program finds something at a path."""
        try:
            self.find(path)
        except KeyError:
            return False
        return True

    def _file(self, path: str) -> File:
        node = self.find(path)
        assert isinstance(node, File), f"{path} is a folder"
        return node

    def _open(self, event: Open) -> None:
        if not self.exists(event.path):
            self._change(event.path, File())
        elif event.truncate:
            self._file(event.path).pending.append((self._number, Resize(event.path, 0)))

    def _placed(self, change: DataChange) -> DataChange:
        """A write at the end gets the place that the end is at now, so that it stays there if others are lost."""
        if isinstance(change, Write) and change.offset is None:
            return Write(change.path, len(self._file(change.path).content()), change.data)
        return change

    def _change(self, path: str, node: File | Folder | None) -> None:
        folder, name = self._parent(path)
        folder.pending.append((self._number, {name: node}))

    def _parent(self, path: str) -> tuple[Folder, str]:
        head, _, name = path.rpartition("/")
        folder = self.find(head)
        assert isinstance(folder, Folder), f"{head} is a file"
        return folder, name

    def _rename(self, event: Rename) -> None:
        node = self.find(event.source)
        (old, old_name), (new, new_name) = self._parent(event.source), self._parent(event.target)
        if old is new:
            new.pending.append((self._number, {old_name: None, new_name: node}))
        else:
            new.pending.append((self._number, {new_name: node}))
            old.pending.append((self._number, {old_name: None}))


def _snapshot(folder: Path) -> Folder:
    """What lies in a real folder, as if it had all been on the disk for long."""
    out = Folder()
    for entry in os.scandir(folder):
        path = Path(entry.path)
        out.durable[entry.name] = _snapshot(path) if entry.is_dir() else File(path.read_bytes())
    return out


def files_in(folder: Folder, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Path and bytes of every file that a program now sees in a folder."""
    for name, node in folder.entries().items():
        if isinstance(node, Folder):
            yield from files_in(node, f"{prefix}{name}/")
        else:
            yield prefix + name, node.content()
