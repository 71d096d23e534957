"""Writes the ids of one dataset, and goes on where it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy

from flm_megatron.data.corpus.description import LARGEST_COUNT, Description, file_of, refuse_too_many
from flm_megatron.data.corpus.index_file import id_dtype, write_index
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import RequestError

READ_AT_ONCE = 2**24


class Written(NamedTuple):
    """How much of a dataset there is."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class Writer:
    """PREFIX.bin, and the documents' lengths until its index is written."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, written: Written) -> None:
        """Open PREFIX.bin, of which what was `written` is kept, and what lies behind that is not."""
        self._prefix, self._tokenizer, self.written = prefix, tokenizer, written
        self._dtype = numpy.dtype(id_dtype(tokenizer.vocab_size))
        sizes = {"bin": written.tokens * self._dtype.itemsize, "lengths": written.documents * 4}
        self._files = [file_of(prefix, suffix).open("ab") for suffix in sizes]
        for file, size in zip(self._files, sizes.values(), strict=True):
            file.truncate(size)

    def add(self, ids: numpy.ndarray, lengths: numpy.ndarray, text_bytes: int) -> None:
        """Append documents of these `lengths`.

        Raises:
            RequestError: there are too many, or one is longer than an index can say.
        """
        documents = self.written.documents + len(lengths)
        refuse_too_many(documents, self._prefix.name)
        if len(lengths) and lengths.max() > LARGEST_COUNT:
            raise RequestError(f"a document has {lengths.max():,} tokens, more than {LARGEST_COUNT:,}: split it")
        self._files[0].write(ids.astype(self._dtype).tobytes())
        self._files[1].write(lengths.astype("<i4").tobytes())
        self.written = Written(documents, self.written.tokens + len(ids), self.written.text_bytes + text_bytes)

    def sync(self) -> None:
        """Force to disk what was added."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def finish(self) -> Description:
        """Write the index and the description.

        Raises:
            RequestError: there were no documents.
        """
        self.close()
        if not self.written.documents:
            raise RequestError(f"dataset {self._prefix.name} would have no documents: give more text")
        lengths, data = file_of(self._prefix, "lengths"), file_of(self._prefix, "bin")
        write_index(file_of(self._prefix, "idx"), lengths, self._dtype)
        description = Description(
            tokens=self.written.tokens,
            text_bytes=self.written.text_bytes,
            documents=self.written.documents,
            vocab_size=self._tokenizer.vocab_size,
            tokenizer=self._tokenizer.fingerprint,
            eod=self._tokenizer.eod,
            pad=self._tokenizer.pad,
            bin_bytes=data.stat().st_size,
            idx_bytes=file_of(self._prefix, "idx").stat().st_size,
            sha256=_sha256(data),
        )
        description.write(file_of(self._prefix, "json"))
        return description


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_AT_ONCE):
            hashed.update(part)
    return hashed.hexdigest()
