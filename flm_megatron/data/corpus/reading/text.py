"""Plain text and JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from flm_megatron.data.corpus.reading.opened import opened
from flm_megatron.errors import RequestError
from flm_megatron.json_text import parse_json


def of_text(path: Path) -> Iterator[str]:
    """A file that is one document. Raises RequestError if it is not UTF-8."""
    with opened(path) as file:
        yield decoded(file.read(), str(path), 0)


def of_lines(path: Path, field: str) -> Iterator[str]:
    """The documents of JSON lines. Raises RequestError, naming the line."""
    with opened(path) as lines:
        yield from each_line(lines, str(path), field)


def each_line(lines: Iterable[bytes], where: str, field: str) -> Iterator[str]:
    """The text in each line that is not blank. Raises RequestError, naming the line."""
    start = 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield text_of(decoded(line, where, start), field, f"{where} line {number}")
        start += len(line)


def decoded(data: bytes, where: str, start: int) -> str:
    """UTF-8 bytes, which begin at offset `start`, as text. Raises RequestError, naming the offset."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {start + error.start}"
        ) from None


def text_of(line: str, field: str, where: str) -> str:
    """The text in the field of a JSON object. Raises RequestError, naming `where` it is."""
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise RequestError(f"{where} is not a JSON object but {type(record).__name__}")
    if field not in record:
        raise RequestError(f"{where} has no field {field!r}; its fields are {names(record)} (choose with --field)")
    text = record[field]
    if not isinstance(text, str):
        raise RequestError(f"{where}: field {field!r} is not text but {type(text).__name__}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"{where}: field {field!r} has an escape of half a surrogate pair, which is not UTF-8")
    return text


def names(fields: Iterable[str]) -> str:
    """Fields for an error."""
    return ", ".join(repr(name) for name in fields) or "none"
