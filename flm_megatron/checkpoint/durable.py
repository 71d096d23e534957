"""Files and folder entries that outlive a power cut: written, then forced to the disk."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file and have the disk hold its bytes (its name is held once its folder is synchronised: `sync`).

    Raises OSError as `open` and `write` do.
    """
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Have the disk hold a file, or the entries of a folder. Raises OSError as `os.fsync` does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
