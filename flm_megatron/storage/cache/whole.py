"""Files of this machine for objects that are needed as a whole: indices, tokenizers, conversations, texts."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from flm_megatron.durable import sync
from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath
from flm_megatron.storage.cache.place import FOLDER_VARIABLE, WHOLE, cache_root, entry_folder, used, wrote
from flm_megatron.storage.store import ObjectInfo, download, info
from flm_megatron.url import is_url, name_of, shown


def file_at(path: FilePath) -> Path | None:
    """The file of this machine at `path`, or a copy of the object there as it is now; none if there is neither.

    A copy has the object's name, in a folder of its own for each version. Nothing of a store is touched for a path.

    Raises:
        RequestError: the store fails, or the cache cannot be written.
    """
    if not is_url(path):
        return Path(path) if Path(path).is_file() else None
    found = info(str(path))
    return copy_of(found) if found else None


def file_sha256(path: FilePath) -> str | None:
    """SHA-256 of the file or object at `path`; none if there is none, or it cannot be read."""
    try:
        file = file_at(path)
        return hashlib.sha256(file.read_bytes()).hexdigest() if file else None
    except (OSError, RequestError):
        return None


def copy_of(found: ObjectInfo) -> Path:
    """The copy of a version of an object, brought here unless it is here. Processes of a machine bring it once."""
    from filelock import FileLock

    folder = entry_folder(WHOLE, found)
    path = folder / name_of(found.url)
    if not _is_whole(path, found):
        with FileLock(folder / ".lock"):
            if not _is_whole(path, found):
                _bring(found, path)
    used(path)
    return path


def _is_whole(path: Path, found: ObjectInfo) -> bool:
    return path.is_file() and path.stat().st_size == found.size


def _bring(found: ObjectInfo, path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        download(found, partial)
        partial.replace(path)
        sync(path.parent)
    except FileNotFoundError:
        raise RequestError(f"{shown(found.url)} was removed while it was read: bring it back") from None
    except OSError as error:
        raise RequestError(
            f"the cache {cache_root()} cannot hold {shown(found.url)} ({error.strerror or error}): "
            f"set {FOLDER_VARIABLE} to a folder with {found.size:,} bytes of room"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    wrote(found.size)
