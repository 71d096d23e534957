"""Files and folders that survive a power cut: bytes and names are forced to disk, in the right order.

Without that a power cut may lose, tear or reorder the bytes of a file, a name in a folder, and the name of that folder
in its parent, each independently. So a rename alone publishes nothing: the bytes are forced first, the name afterwards.
All functions raise OSError as the system does.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file and force its bytes to disk; its name is safe once its folder is (`sync`)."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file by `data`: a reader, also after a power cut, finds the old bytes or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_file(partial, data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents, and force their names to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Force the bytes of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have the disk hold everything in a folder, at any depth, and the names in it.

    Over a network each machine forces what it wrote itself: call it on all of them, or `sync` after each file.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
