"""Documents out of one file of any form: text, JSON lines, Parquet, Arrow, WebDataset archives, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flm_megatron.data.corpus.reading.opened import plain_name

JSONL = (".jsonl", ".ndjson")
COLUMNS = (".parquet", ".arrow", ".feather")
ARCHIVES = (".tar",)


def documents_of(path: Path, field: str) -> Iterator[str]:
    """The text of each document of a file, in order; `field` holds it where there are fields.

    Raises:
        RequestError: a file that is empty or not UTF-8, or a record without text in the field; the message names the
            file and the byte offset, the line, the row or the member. A package that the form needs is not there.
        DamagedError: a compressed file, a table or an archive that cannot be read.
    """
    form = Path(plain_name(path)).suffix
    if form in COLUMNS:
        from flm_megatron.data.corpus.reading.columns import of_table

        return of_table(path, field)
    if form in ARCHIVES:
        from flm_megatron.data.corpus.reading.archives import of_archive

        return of_archive(path, field)
    from flm_megatron.data.corpus.reading.text import of_lines, of_text

    return of_lines(path, field) if form in JSONL else of_text(path)


def is_text_as_it_lies(path: Path) -> bool:
    """Whether the size of a file is about that of its text."""
    return plain_name(path) == path.name and path.suffix not in COLUMNS
