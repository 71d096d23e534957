"""A folder that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from flm_megatron.checkpoint.files.at_url import begin_at_url, discard_at_url, publish_at_url, refuse_existing_url
from flm_megatron.checkpoint.lease.fence import check_fences, discard
from flm_megatron.checkpoint.lease.lease import lease
from flm_megatron.distributed.processes import Processes
from flm_megatron.durable import make_folders, sync, sync_tree, write_file
from flm_megatron.errors import RequestError
from flm_megatron.paths import require_folder
from flm_megatron.storage.path import ObjectPath

PARTIAL = ".partial"
"""Suffix of a folder's name while it is written, after a token of its writer; earlier versions wrote none."""
TOKEN_BYTES = 4
_PARTIAL_NAME = re.compile(rf"(.+?)(?:~[0-9a-f]{{{2 * TOKEN_BYTES}}})?{re.escape(PARTIAL)}")


def final_name(name: str) -> str | None:
    """The name that a folder which is written under `name` gets when it is complete; none if it is no such name."""
    found = _PARTIAL_NAME.fullmatch(name)
    return found[1] if found else None


@contextlib.contextmanager
def destination(path: Path, processes: Processes, nbytes: int) -> Iterator[Path]:
    """A fresh folder beside `path`, renamed to `path` at the end, removed after a failure; all processes enter.

    Raises RequestError as `reserved`, if the disk becomes full, and for a URL.
    """
    if isinstance(path, ObjectPath):
        raise RequestError(f"{path} is a URL, and this format is written to folders of this machine alone: give one")
    with reserved(path, processes, nbytes), new_folder(path, processes) as folder:
        yield folder
        processes.on_first(lambda: _publish_all(folder, path))


@contextlib.contextmanager
def new_folder(path: Path, processes: Processes) -> Iterator[Path]:
    """A fresh folder beside `path`, to be filled and passed to `publish`; removed after a failure; all processes enter.

    Leftovers of a process that died are removed first. Raises RequestError if `path` exists or cannot be written.
    """
    folder = processes.on_first(lambda: begin_at_url(path) if isinstance(path, ObjectPath) else _start(path))
    try:
        yield folder
    except BaseException:
        if processes.rank == 0:
            discard_at_url(folder) if isinstance(folder, ObjectPath) else discard(folder)
        raise


def write_small(path: Path, data: bytes) -> None:
    """Write a file and force it to disk, or an object."""
    path.write_bytes(data) if isinstance(path, ObjectPath) else write_file(path, data)


def publish(folder: Path, path: Path, last: Mapping[str, bytes] | None = None) -> None:
    """Rename `folder`, whose files are synced to disk, to `path`, with the files `last`. For one process.

    At a URL nothing is renamed: the first of `last` is what makes the folder exist, and is written only now. Raises
    RequestError if `path` has appeared meanwhile or cannot be written.
    """
    last = last or {}
    if isinstance(path, ObjectPath):
        return publish_at_url(path, last)
    with write_errors(path):
        for name, data in last.items():
            write_file(folder / name, data)
        sync(folder)
        if path.exists():
            raise RequestError(f"{path} has appeared meanwhile: choose another destination or remove it")
        check_fences()
        folder.rename(path)
        sync(path.parent)


@contextlib.contextmanager
def reserved(path: Path, processes: Processes, nbytes: int) -> Iterator[None]:
    """During the block only these processes write `path`, and no other removes their half-written folder.

    Leftovers of an interrupted run beside `path` are removed first. Raises RequestError if `path` exists, if another
    process is writing it, or if `nbytes` do not fit on its disk.
    """
    if isinstance(path, ObjectPath):  # `new_folder` claims it, and a store has no end
        with _sigterm_is_an_error(processes):
            yield
        return
    processes.on_first(lambda: _make_room_for_lease(path, nbytes))
    advice = "wait until it has ended, or choose another destination"
    file = path.with_name(f".{path.name}.lease")
    with _sigterm_is_an_error(processes), lease(file, str(path), advice, processes):
        processes.on_first(lambda: _make_room(path, nbytes))
        yield


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk into a RequestError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error


def require_new(path: Path) -> None:
    """Check, before anything is read, that a folder could be made at `path`; if it exists that is refused later.

    Raises RequestError if it could not.
    """
    if isinstance(path, ObjectPath):
        refuse_existing_url(path)
    elif not os.path.lexists(path):
        require_folder(path, "destination")


def refuse_without_room(path: Path, nbytes: int) -> None:
    """Raise RequestError if `path` exists or `nbytes` are more than its disk has free."""
    if isinstance(path, ObjectPath):
        return refuse_existing_url(path)
    _refuse_existing(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise RequestError(f"{path} needs {nbytes:,} bytes and its disk has {free:,} free: make room first")


@contextlib.contextmanager
def _sigterm_is_an_error(processes: Processes) -> Iterator[None]:
    """Within the block SIGTERM unwinds a single process with the default handler, so that nothing half-written stays.

    Among several processes it ends the process at once: the handler would wait for the collective that it interrupted.
    """
    alone = processes.size == 1 and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _make_room_for_lease(path: Path, nbytes: int) -> None:
    """Make the folder above `path`, unless it is already clear that nothing can be written there."""
    if not _leftovers(path):
        refuse_without_room(path, nbytes)
    with write_errors(path):
        make_folders(path.parent)


def _make_room(path: Path, nbytes: int) -> None:
    """Remove leftovers of an interrupted run; check again whether `path` can be written."""
    with write_errors(path):
        _clear(path)
    refuse_without_room(path, nbytes)


def _start(path: Path) -> Path:
    """Make the folder under a name of its own: what an earlier writer that was stopped may still write, it writes
    into a folder that is gone."""
    _refuse_existing(path)
    folder = path.with_name(f"{path.name}~{os.urandom(TOKEN_BYTES).hex()}{PARTIAL}")
    with write_errors(path):
        _clear(path)
        make_folders(folder)
    return folder


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise RequestError(f"{path} exists already: choose another destination or remove it")


def _clear(path: Path) -> None:
    check_fences()
    for folder in _leftovers(path):
        shutil.rmtree(folder)


def _leftovers(path: Path) -> list[Path]:
    """What interrupted runs left of `path`."""
    if not path.parent.is_dir():
        return []
    return [entry for entry in path.parent.iterdir() if final_name(entry.name) == path.name]


def _publish_all(folder: Path, path: Path) -> None:
    with write_errors(path):
        sync_tree(folder)
    publish(folder, path)
