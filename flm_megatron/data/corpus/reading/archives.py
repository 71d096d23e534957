"""Tar archives, as WebDataset lays them out: files of one sample follow each other and share the name before the first
dot. A sample's text is its `.txt`, or else the field of its `.json`; JSON lines hold a document in each line."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from flm_megatron.data.corpus.reading.opened import opened
from flm_megatron.data.corpus.reading.text import decoded, each_line, text_of
from flm_megatron.errors import DamagedError, RequestError, one_line

TEXT, RECORD, LINES = ".txt", ".json", ".jsonl"
Member = tuple[str, str, bytes]
"""Name of the sample, ending, content."""


def of_archive(path: Path, field: str) -> Iterator[str]:
    """The documents of an archive, read in order.

    Raises:
        RequestError: it holds no text, or a record lacks the field; names the member.
        DamagedError: it is no archive, or ends too early.
    """
    found = False
    try:
        with opened(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for key, members in groupby(_members(archive), lambda member: member[0]):
                by_ending = {ending: data for _, ending, data in members}
                for text in _documents(by_ending, f"{path}: {key}", field):
                    found = True
                    yield text
    except tarfile.TarError as error:
        raise DamagedError(one_line(f"{path} is no whole tar archive: {error}")) from None
    if not found:
        raise RequestError(f"{path} holds no text: neither *{TEXT} nor *{RECORD} nor *{LINES}")


def _members(archive: tarfile.TarFile) -> Iterator[Member]:
    for member in archive:
        name = PurePosixPath(member.name)
        key, dot, ending = name.name.partition(".")
        if member.isfile() and f".{ending.rpartition('.')[2]}" in (TEXT, RECORD, LINES):
            file = archive.extractfile(member)
            assert file is not None, "regular files have content"
            yield str(name.with_name(key)), dot + ending, file.read()


def _documents(by_ending: dict[str, bytes], where: str, field: str) -> Iterator[str]:
    texts = {ending: data for ending, data in by_ending.items() if ending.endswith(TEXT)}
    for ending, data in (texts or by_ending).items():
        place = where + ending
        if ending.endswith(TEXT):
            yield decoded(data, place, 0)
        elif ending.endswith(LINES):
            yield from each_line(data.splitlines(keepends=True), place, field)
        else:
            yield text_of(decoded(data, place, 0), field, place)
