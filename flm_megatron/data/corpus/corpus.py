"""Documents from files: plain text, JSON lines, tables, archives and source trees, here or in a store."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import islice
from pathlib import Path

from flm_megatron.data.corpus.reading import documents_of, is_text_as_it_lies
from flm_megatron.data.corpus.reading.columns import saved_dataset
from flm_megatron.errors import RequestError
from flm_megatron.storage.cache.whole import copy_of
from flm_megatron.storage.store import ObjectInfo, below, info
from flm_megatron.url import FilePath, is_url, shown

CODE_SUFFIXES = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh")
PROSE_SUFFIXES = (".md", ".rst", ".txt")
ALL_SUFFIXES = CODE_SUFFIXES + PROSE_SUFFIXES
PATTERN = frozenset("*?[")
LOOKED_AT, SHOWN = 10_000, 10
"""Entries of a folder that are looked at, and endings that are named, where none of its files is taken."""


@dataclass(frozen=True)
class Corpus:
    """Where documents come from.

    An input that is a folder is a source tree: each file with one of `suffixes` is read, in the order of sorted paths,
    and files without any text are left out; or a dataset that `datasets` saved. JSON lines (.jsonl, .ndjson), Parquet
    and Arrow hold a document in the field `field` of each record, archives (.tar) in their .txt and .json members; any
    other file is one document. All but tables may be compressed (.gz, .bz2, .xz, .zst). An input may be a pattern
    (`web/*.jsonl.zst`), or the URL of an object or a pattern of some, which are brought here one after another.
    """

    inputs: Sequence[FilePath]
    field: str = "text"
    suffixes: Sequence[str] = ALL_SUFFIXES

    def files(self) -> Iterator[Path]:
        """Every file, in order.

        Raises:
            RequestError: an input is not there, or a folder has no file with the suffixes.
            DamagedError: a saved dataset that does not say what it holds.
        """
        for given in self.inputs:
            yield from map(copy_of, _objects(str(given))) if is_url(given) else self._local(Path(given))

    def size_bytes(self) -> int | None:
        """Bytes of all files, for progress and sampling; none where they say little of the text: compressed, tables, or
        in a store."""
        if any(is_url(given) for given in self.inputs):
            return None
        files = list(self.files())
        return sum(path.stat().st_size for path in files) if all(map(is_text_as_it_lies, files)) else None

    def identity(self) -> str:
        """Stands for the text as it is now: every file or object with its size and when it was written, and what is
        read of it. Raises as `files`."""
        hashed = sha256(repr((self.field, [str(given) for given in self.inputs])).encode())
        for given in self.inputs:
            for part in _objects(str(given)) if is_url(given) else map(_stamp, self._local(Path(given))):
                hashed.update(repr(part).encode())
        return hashed.hexdigest()

    def documents(self) -> Iterator[str]:
        """The text of each document, in the order of the inputs.

        Raises:
            RequestError: a file is empty or not UTF-8, or a record has no text in the field;
                the message names the file and the byte offset, the line or the row.
            DamagedError: a file cannot be decompressed, or is not of its form.
        """
        trees = [Path(given) for given in self.inputs if not is_url(given) and Path(given).is_dir()]
        for path in self.files():
            if path.stat().st_size == 0:
                if any(tree in path.parents for tree in trees):
                    continue
                raise RequestError(f"{path} is empty")
            yield from documents_of(path, self.field)

    def _local(self, path: Path) -> Iterator[Path]:
        if path.is_dir():
            saved = saved_dataset(path)
            return self._tree(path) if saved is None else iter(saved)
        if path.is_file():
            return iter([path])
        found = sorted(map(Path, glob.glob(str(path), recursive=True))) if PATTERN & set(str(path)) else []
        files = [entry for entry in found if entry.is_file()]
        if not files:
            raise RequestError(f"input {path} is not there")
        return iter(files)

    def _tree(self, root: Path) -> Iterator[Path]:
        found = sorted(path for path in root.rglob("*") if path.suffix in self.suffixes and path.is_file())
        if not found:
            raise RequestError(
                f"folder {root} has no file that ends in {' '.join(self.suffixes)}: {_advice(root, self.suffixes)}"
            )
        return iter(found)


def _stamp(path: Path) -> tuple[str, int, int]:
    """A file as it is now."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def _objects(url: str) -> list[ObjectInfo]:
    """An object, or all whose URLs are of a pattern, in order. Raises RequestError if there are none."""
    if not PATTERN & set(url):
        found = info(url)
        objects = [found] if found else []
    else:
        fixed = url[: min(url.index(sign) for sign in PATTERN if sign in url)]
        there = below(fixed.rpartition("/")[0])
        objects = sorted((each for each in there if fnmatchcase(each.url, url)), key=lambda each: each.url)
    if not objects:
        raise RequestError(f"input {shown(url)} is not there")
    return objects


def _advice(root: Path, suffixes: Sequence[str]) -> str:
    """What to do about a folder of which no file is taken."""
    there = sorted({path.suffix for path in islice(root.rglob("*"), LOOKED_AT) if path.is_file()} - set(suffixes))
    if "" in there:
        return 'take its files without an ending with --suffixes ""'
    return f"choose with --suffixes; there are {' '.join(there[:SHOWN])}" if there else "it holds no files"
