"""Objects as paths: what reads files by `pathlib` reads objects as well, and what would write them is refused."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, NoReturn

from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath, expanded
from flm_megatron.storage import store
from flm_megatron.storage.reading import ObjectFile
from flm_megatron.url import is_url


class ObjectPath(type(Path())):  # type: ignore[misc]  # of PosixPath, which before Python 3.12 only this names
    """The URL of an object or of the folder that its slashes make of it, as a Path.

    Names and parents are those of a Path, and so are the methods that read: each asks the store and raises as a file
    system does where nothing is there, RequestError where the store fails. `str()` is the URL. There are no folders
    to make and nothing is ever renamed: methods that would raise RequestError.
    """

    def __str__(self) -> str:
        scheme, *rest = PurePath.__str__(self).split("/")
        return f"{scheme}//" + ("/" if scheme == "file:" else "") + "/".join(rest)

    def __fspath__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[object, ...]:
        return ObjectPath, (str(self),)

    def is_absolute(self) -> bool:
        """Always: a URL is meant nowhere else."""
        return True

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Itself: a store has no links."""
        return self

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return store.info(str(self)) is not None

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return bool(self.objects())

    def exists(self, **_: object) -> bool:
        """Whether there is an object of this name, or below."""
        return self.is_file() or self.is_dir()

    def objects(self) -> dict[str, store.ObjectInfo]:
        """All objects at any depth by their names below this, by one list."""
        root = f"{self}/"
        return {found.url.removeprefix(root): found for found in store.below(str(self)) if found.url.startswith(root)}

    def stat(self, **_: object) -> os.stat_result:
        """Size and kind; all else is 0."""
        found = store.info(str(self))
        if found is None and not self.is_dir():
            raise FileNotFoundError(f"{self} is not there")
        size, kind = (found.size, stat.S_IFREG) if found else (0, stat.S_IFDIR)
        return os.stat_result((kind | 0o444, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies right below, each once."""
        names = {name.partition("/")[0] for name in self.objects()}
        if not names:
            raise FileNotFoundError(f"{self} is not there")
        return iter([self / name for name in sorted(names)])

    def glob(self, pattern: str, **_: object) -> Iterator[ObjectPath]:
        """What lies right below with a name of `pattern`."""
        names = {name.partition("/")[0] for name in self.objects()}
        return iter([self / name for name in sorted(names) if fnmatchcase(name, pattern)])

    def rglob(self, pattern: str, **_: object) -> Iterator[ObjectPath]:
        """Objects at any depth whose own name is of `pattern`."""
        return iter([self / name for name in self.objects() if fnmatchcase(PurePath(name).name, pattern)])

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **_: object) -> Any:
        """The object for reading, in ranges as it is read. Raises FileNotFoundError; RequestError to write."""
        if set(mode) - set("rbt"):
            self._refuse()
        file = ObjectFile(str(self))
        if buffering == 0:
            return file
        return io.BufferedReader(file) if "b" in mode else io.TextIOWrapper(io.BufferedReader(file), encoding)

    def read_bytes(self) -> bytes:
        """All of a small object."""
        return store.read(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: object) -> str:
        """All of a small object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Write a small object as a whole, over what is there."""
        store.write(str(self), bytes(data))
        return len(data)

    def unlink(self, missing_ok: bool = True) -> None:
        """Delete an object; nothing if it is not there."""
        store.remove(str(self))

    def mkdir(self, *_: object, **__: object) -> None:
        """Nothing: an object needs no folder."""

    def rename(self, *_: object) -> NoReturn:
        """Refused: a store has no such step."""
        self._refuse()

    replace = rename

    def _refuse(self) -> NoReturn:
        raise RequestError(f"{self} is a URL, and this writes only to paths of this machine: give one")


def location(path: FilePath) -> Path:
    """A path as it is, and a URL as an ObjectPath."""
    if isinstance(path, Path):
        return path
    return ObjectPath(path) if is_url(path) else Path(path)


def given_location(path: FilePath, what: str) -> Path:
    """`location` of a path as `paths.expanded` gives it; asks no store. Raises RequestError as that does, or if its
    kind of store cannot be opened here."""
    full = expanded(os.fspath(path), what)
    if is_url(full):
        store.require_url(full, what)
    return location(full)
