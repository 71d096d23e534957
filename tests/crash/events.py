"""Changes to files under one folder, in the order in which they happened.

Paths are relative to that folder, with `/` between their parts; the folder itself is the empty string.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Open:
    """A file was opened for writing: made if it was not there, emptied if `truncate`."""

    path: str
    truncate: bool = False


@dataclass(frozen=True)
class Write:
    """Bytes were written at `offset`, at the end of the file if none."""

    path: str
    offset: int | None
    data: bytes


@dataclass(frozen=True)
class Resize:
    """A file was cut or filled with zeros to `size` bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class MakeFolder:
    """A folder was made."""

    path: str


@dataclass(frozen=True)
class Remove:
    """A file, or an empty folder, was removed."""

    path: str


@dataclass(frozen=True)
class Rename:
    """A file or folder got another name, in the place of a file that may have had it."""

    source: str
    target: str


@dataclass(frozen=True)
class SyncBegins:
    """A process asked for a file's bytes, or a folder's entries, to be on the disk; what follows is not covered."""

    path: str
    number: int


@dataclass(frozen=True)
class SyncEnds:
    """What was there when sync `number` began is on the disk."""

    number: int


@dataclass(frozen=True)
class Mark:
    """Something that the recorded program said about itself, such as `saved`."""

    text: str


Event = Open | Write | Resize | MakeFolder | Remove | Rename | SyncBegins | SyncEnds | Mark
