"""A folder that appears under its name only when it is whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from flm_megatron.checkpoint.processes import Processes
from flm_megatron.checkpoint.writer import PARTIAL
from flm_megatron.durable import make_folders, sync, sync_tree
from flm_megatron.errors import RequestError


@contextlib.contextmanager
def destination(path: Path, processes: Processes, nbytes: int) -> Iterator[Path]:
    """A fresh folder beside `path`, renamed to `path` at the end, removed after a failure; all processes enter.

    What an interrupted run left beside `path` is removed first. Raises RequestError if `path` exists or `nbytes`
    do not fit on its disk, then or later.
    """
    partial = path.with_name(path.name + PARTIAL)
    processes.on_first(lambda: _prepare(path, partial, nbytes))
    try:
        yield partial
        processes.on_first(lambda: _publish(path, partial))
    except BaseException:
        if processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into a RequestError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error


def refuse_without_room(path: Path, nbytes: int) -> None:
    """Raise RequestError if `path` exists or `nbytes` are more than its disk has free."""
    if path.exists() or path.is_symlink():
        raise RequestError(f"{path} exists already: choose another destination or remove it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise RequestError(f"{path} needs {nbytes:,} bytes and its disk has {free:,} free: make room first")


def _prepare(path: Path, partial: Path, nbytes: int) -> None:
    with write_errors(path):
        if partial.exists():
            shutil.rmtree(partial)
        refuse_without_room(path, nbytes)
        make_folders(partial)


def _publish(path: Path, partial: Path) -> None:
    with write_errors(path):
        sync_tree(partial)
        if path.exists():
            raise RequestError(f"{path} has appeared meanwhile: choose another destination or remove it")
        partial.rename(path)
        sync(path.parent)
