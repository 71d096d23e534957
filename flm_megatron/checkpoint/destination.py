"""A folder that appears under its name only when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flm_megatron.checkpoint.workers import Workers
from flm_megatron.errors import RequestError


@contextlib.contextmanager
def destination(path: Path, workers: Workers, nbytes: int = 0) -> Iterator[Path]:
    """A fresh folder beside `path`, renamed to `path` at the end, removed after a failure; all processes enter.

    What an interrupted run left beside `path` is removed first. Raises RequestError if `path` exists or `nbytes`
    do not fit on its disk.
    """
    partial = path.parent / f".{path.name}.partial"
    workers.together(lambda: _prepare(path, partial, nbytes), only_first=True)
    try:
        yield partial
        workers.together(lambda: _publish(path, partial), only_first=True)
    except BaseException:
        if workers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Have the disk hold a file or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(path: Path) -> None:
    """Raise RequestError if there is something at `path`."""
    if path.exists() or path.is_symlink():
        raise RequestError(f"{path} exists; give another destination or remove it")


def _prepare(path: Path, partial: Path, nbytes: int) -> None:
    refuse_existing(path)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if nbytes > free:
        shutil.rmtree(partial)
        raise RequestError(f"{path}: {nbytes:,} bytes are needed and {free:,} are free on its disk; free some space")


def _publish(path: Path, partial: Path) -> None:
    sync(partial)
    refuse_existing(path)
    partial.rename(path)
    sync(path.parent)
