"""The folder of the cache, and how it stays within its size: what was used longest ago goes first.

`FLM_CACHE` names the folder (else flm_megatron below the user's cache folder), `FLM_CACHE_GIB` its size. Any number of
processes share it: an entry appears under its name as a whole, and one that is removed stays readable to those that
have it open.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from flm_megatron.durable import make_folders
from flm_megatron.errors import RequestError
from flm_megatron.storage.store import ObjectInfo

FOLDER_VARIABLE, SIZE_VARIABLE = "FLM_CACHE", "FLM_CACHE_GIB"
SIZE_GIB = 100.0
KEPT_SHARE = 0.9
"""Of the size, after entries were removed."""
SWEEP_SHARE = 0.02
"""Of the size, that a process writes before it looks how large the cache is."""
WHOLE, BLOCKS = "whole", "blocks"
SAFE_S = 24 * 3600.0
"""A whole file that was used within so many seconds stays: it may be about to be opened by its path."""
USE_RESOLUTION_S = 60.0
_written = {"bytes": 0}


def cache_root() -> Path:
    """The folder of the cache, which need not be there yet."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flm_megatron"


def size_limit() -> int:
    """Bytes that the cache may hold.

    Raises:
        RequestError: the variable is no number above 0.
    """
    given = os.environ.get(SIZE_VARIABLE, str(SIZE_GIB))
    try:
        gib = float(given)
    except ValueError:
        gib = 0.0
    if not gib > 0:
        raise RequestError(f"{SIZE_VARIABLE} is {given!r}: give the GiB that the cache of data at URLs may take")
    return int(gib * 2**30)


def entry_folder(kind: str, found: ObjectInfo) -> Path:
    """The folder for a version of an object; made if missing. Raises RequestError if it cannot be."""
    key = hashlib.sha256(f"{found.url}\n{found.version}\n{found.size}".encode()).hexdigest()[:32]
    folder = cache_root() / kind / key
    try:
        if not folder.is_dir():
            make_folders(folder)
    except OSError as error:
        raise RequestError(
            f"the cache {cache_root()} cannot be written ({error.strerror}): set {FOLDER_VARIABLE} to another folder"
        ) from None
    return folder


def used(path: Path) -> None:
    """Note that an entry is used now, a minute more or less."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > USE_RESOLUTION_S:
            os.utime(path)


def wrote(size: int) -> None:
    """Note that this process added `size` bytes; now and then entries are removed, by one process at a time."""
    _written["bytes"] += size
    limit = size_limit()
    if _written["bytes"] > SWEEP_SHARE * limit:
        _written["bytes"] = 0
        sweep(limit)


def sweep(limit: int) -> None:
    """Remove what was used longest ago, if there are more than `limit` bytes, until KEPT_SHARE of them are left."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(cache_root() / ".sweep", timeout=0):
            entries = sorted(_entries())
            total = sum(size for _, size, _ in entries)
            if total <= limit:
                return
            for when, size, path in entries:
                if total <= KEPT_SHARE * limit:
                    break
                if path.parent.parent.name == WHOLE and time.time() - when < SAFE_S:
                    continue
                path.unlink(missing_ok=True)
                total -= size
    except (Timeout, OSError):
        return


def _entries() -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, path) of every file of the cache that can be removed."""
    for kind in (WHOLE, BLOCKS):
        for path in (cache_root() / kind).glob("*/*"):
            with suppress(OSError):
                stat = path.stat()
                if not path.name.startswith("."):
                    yield stat.st_mtime, stat.st_size, path
