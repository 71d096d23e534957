"""Documents from files: plain text, JSON lines and source trees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.json_text import parse_json
from flm_megatron.paths import FilePath

JSONL_SUFFIXES = (".jsonl", ".ndjson")
CODE_SUFFIXES = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh")
PROSE_SUFFIXES = (".md", ".rst", ".txt")
ALL_SUFFIXES = CODE_SUFFIXES + PROSE_SUFFIXES

LOOKED_AT, SHOWN = 10_000, 10
"""Entries of a folder that are looked at, and endings that are named, where none of its files is taken."""


@dataclass(frozen=True)
class Corpus:
    """Where documents come from.

    An input that is a folder is a source tree: each file with one of `suffixes` is a document, in the order of
    sorted paths, and files without any text are left out. A file that ends in .jsonl or .ndjson has a document in
    the field `field` of each line. Any other file is one document.
    """

    inputs: Sequence[FilePath]
    field: str = "text"
    suffixes: Sequence[str] = ALL_SUFFIXES

    def files(self) -> Iterator[Path]:
        """Every file, in order.

        Raises:
            RequestError: an input is not there, or a folder has no file with the suffixes.
        """
        for given in self.inputs:
            path = Path(given)
            if path.is_dir():
                yield from self._tree(path)
            elif path.is_file():
                yield path
            else:
                raise RequestError(f"input {path} is not there")

    def size_bytes(self) -> int:
        """Bytes of all files, for progress and sampling."""
        return sum(path.stat().st_size for path in self.files())

    def documents(self) -> Iterator[str]:
        """The text of each document, in the order of the inputs.

        Raises:
            RequestError: a file is empty or not UTF-8, or a line is not an object with the text field;
                the message names the file and the byte offset or the line.
        """
        trees = [Path(given) for given in self.inputs if Path(given).is_dir()]
        for path in self.files():
            if path.stat().st_size == 0:
                if any(tree in path.parents for tree in trees):
                    continue
                raise RequestError(f"{path} is empty")
            if path.suffix in JSONL_SUFFIXES:
                yield from _json_lines(path, self.field)
            else:
                yield _decode(path.read_bytes(), path, 0)

    def _tree(self, root: Path) -> Iterator[Path]:
        found = sorted(path for path in root.rglob("*") if path.suffix in self.suffixes and path.is_file())
        if not found:
            raise RequestError(
                f"folder {root} has no file that ends in {' '.join(self.suffixes)}: {_advice(root, self.suffixes)}"
            )
        return iter(found)


def _advice(root: Path, suffixes: Sequence[str]) -> str:
    """What to do about a folder of which no file is taken."""
    there = sorted({path.suffix for path in islice(root.rglob("*"), LOOKED_AT) if path.is_file()} - set(suffixes))
    if "" in there:
        return 'take its files without an ending with --suffixes ""'
    return f"choose with --suffixes; there are {' '.join(there[:SHOWN])}" if there else "it holds no files"


def _decode(data: bytes, path: Path, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {start + error.start}"
        ) from None


def _json_lines(path: Path, field: str) -> Iterator[str]:
    start = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _text_of(_decode(line, path, start), field, f"{path} line {number}")
            start += len(line)


def _text_of(line: str, field: str, where: str) -> str:
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise RequestError(f"{where} is not a JSON object but {type(record).__name__}")
    if field not in record:
        raise RequestError(f"{where} has no field {field!r}; its fields are {_names(record)} (choose with --field)")
    text = record[field]
    if not isinstance(text, str):
        raise RequestError(f"{where}: field {field!r} is not text but {type(text).__name__}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"{where}: field {field!r} has an escape of half a surrogate pair, which is not UTF-8")
    return text


def _names(record: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in record) or "none"
