"""Paths as users give them: `~` is their home, and what cannot be written is found before any work is done."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.url import FilePath as FilePath
from flm_megatron.url import is_url, refuse_secret

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg")
"""Endings of the formats in which plots can be written."""

LONGEST_NAME = 255  # bytes, of a name on any file system in use


def expanded(path: str, what: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that home; `what` names its field or option in errors.

    Raises:
        RequestError: it is empty, holds a NUL, names the home of a user that this machine does not know, or is a URL
            with a secret in it.
    """
    if not path:
        raise RequestError(f"{what} is empty: give a path")
    if "\0" in path:
        raise RequestError(f"{what} {path!r} holds a NUL character, which no path can")
    if is_url(path):
        refuse_secret(path, what)
        return path
    full = os.path.expanduser(path)
    if full.startswith("~"):
        user = full.split("/")[0]
        raise RequestError(
            f"{what} {path!r}: {user} is no user of this machine; for a folder of that name give ./{path}"
        )
    return full


def given_path(path: FilePath, what: str) -> Path:
    """`path` as `expanded` gives it. Raises RequestError as that does, or if it is a URL."""
    full = expanded(os.fspath(path), what)
    if is_url(full):
        raise RequestError(f"{what} {full} is a URL, and what is read or written here is a path of this machine")
    return Path(full)


def require_folder(path: FilePath, what: str) -> None:
    """Check that files can be written into the folder `path`, which need not be there yet; leaves nothing behind.

    A URL has no folders: what is there is looked at when it is written.

    Raises:
        RequestError: it is a file, lies below one, or cannot be written; `what` names the field or option.
    """
    if is_url(os.fspath(path)):
        return
    path = Path(path)
    if _kind(path, what) not in (None, stat.S_IFDIR):
        raise RequestError(f"{what} {path} is not a folder: give another path, or move what lies there")
    _require_room_below(path, _nearest(path, what), what)


def require_file(path: FilePath, what: str) -> None:
    """Check that the file `path` can be written, its folder being made if need be; leaves nothing behind.

    Raises:
        RequestError: it is a folder, lies below a file, or cannot be written; `what` names the field or option.
    """
    path = Path(path)
    kind = _kind(path, what)
    if kind == stat.S_IFDIR:
        raise RequestError(f"{what} {path} is a folder: give the name of a file")
    if kind == stat.S_IFREG:
        try:
            with path.open("ab"):  # changes nothing
                return
        except OSError as error:
            raise RequestError(f"{what} {path} cannot be written: {error.strerror}") from None
    if kind is None:
        _require_room_below(path, _nearest(path, what), what)


def require_picture(path: FilePath, what: str) -> None:
    """Check that a plot can be written as the file `path`. Raises RequestError as `require_file`, or if not as that."""
    if Path(path).suffix.lower() not in PICTURES:
        raise RequestError(f"{what} {path} is no picture: give a name that ends in {', '.join(PICTURES)}")
    require_file(path, what)


def _kind(path: Path, what: str) -> int | None:
    """The type of what is at `path` (links followed), as in `st_mode`; none if there is nothing."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        if path.is_symlink():
            raise RequestError(f"{what} {path} is a link to something that is not there: remove it") from None
        return None
    except NotADirectoryError:
        return None
    except OSError as error:
        raise RequestError(f"{what} {path} cannot be written: {error.strerror}") from None


def _nearest(path: Path, what: str) -> Path:
    """The nearest existing folder above `path`. Raises RequestError if something else is in the way."""
    for parent in path.absolute().parents:
        kind = _kind(parent, what)
        if kind == stat.S_IFDIR:
            return parent
        if kind is not None:
            raise RequestError(f"{what} {path} cannot be written: {parent} is not a folder")
    raise RequestError(f"{what} {path} cannot be written: no folder above it is there")


def _require_room_below(path: Path, folder: Path, what: str) -> None:
    """Try to make a file without a name in `folder`; some file systems (/proc, read-only ones) refuse even root."""
    target = path if path.is_dir() else folder
    try:
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise RequestError(f"{what} {path} cannot be written: {error.strerror} in {target}") from None


def is_file_name(name: object) -> bool:
    """Whether `name` is text that names an entry of a folder: no path, not the folder itself or the one above."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    return len(name.encode("utf-8", "replace")) <= LONGEST_NAME and not any("\ud800" <= c <= "\udfff" for c in name)
