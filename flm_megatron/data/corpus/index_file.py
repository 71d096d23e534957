"""The index of a dataset (PREFIX.idx), in megatron-core's layout: how long each document is and where it begins.

Magic, version, code of the type of ids, number of documents, that number + 1; then the documents' lengths in ids
(int32), their places in the .bin in bytes (int64), and their numbers, one after the last included (int64).

Megatron-LM calls the stretches of ids sequences, and numbers documents made of them: those without text have none, and
those of its `--split-sentences` several. Of a dataset that was adopted documents of one sequence and of none are taken.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy

from flm_megatron.errors import DamagedError, read_error

IDX_HEADER = struct.Struct("<9sQBQQ")
IDX_MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Types of ids by their codes; this program writes int32 and uint16."""
SMALL_VOCABULARY = 65500
CHECKED_AT_ONCE = 2**20
"""Documents; so that memory does not grow with the index."""


@dataclass(frozen=True)
class Index:
    """What an index file holds, mapped: `lengths`, `places` and `numbers` of documents; `dtype` of an id."""

    path: Path
    dtype: numpy.dtype[numpy.integer]
    lengths: numpy.ndarray
    places: numpy.ndarray
    numbers: numpy.ndarray

    @property
    def id_bytes(self) -> int:
        """Bytes of one id."""
        return self.dtype.itemsize

    def split(self) -> bool:
        """Whether a document is made of several sequences."""
        return len(self.numbers) > 1 and bool((numpy.diff(self.numbers) > 1).any())

    @property
    def end(self) -> int:
        """Where the last document ends in the .bin, in bytes."""
        return int(self.places[-1]) + int(self.lengths[-1]) * self.id_bytes

    def check(self) -> None:
        """Check every entry: documents lie one after the other, none is empty, and they are numbered in order.

        Reads all of it (20 bytes a document). Each entry follows from the others, so that one that has changed is
        found. Raises DamagedError.
        """
        place, whole = 0, len(self.numbers) == len(self.lengths) + 1
        if not whole and (self.numbers[0] != 0 or (steps := numpy.diff(self.numbers)).min() < 0 or steps.max() > 1):
            raise _damaged(self.path, "does not number its documents in order")
        for first in range(0, len(self.lengths), CHECKED_AT_ONCE):
            lengths = self.lengths[first : first + CHECKED_AT_ONCE].astype(numpy.int64)
            places = place + self.id_bytes * (numpy.cumsum(lengths) - lengths)
            last = first + len(lengths)
            wrong = (lengths <= 0) | (self.places[first:last] != places)
            if whole:
                wrong |= self.numbers[first:last] != numpy.arange(first, last)
            if wrong.any():
                raise _damaged(self.path, f"does not have document {first + int(wrong.argmax())} as it was written")
            place += self.id_bytes * int(lengths.sum())
        if self.numbers[-1] != len(self.lengths):
            raise _damaged(self.path, "does not end as it was written")


def open_index(path: Path, documents: int, adopted: bool = False) -> Index:
    """The index of a dataset of so many documents, besides which one that was `adopted` may number some without text.

    Raises DamagedError if the file is not that, RequestError when its disk does not answer.
    """
    index = open_any_index(path, documents)
    if len(index.lengths) != documents or (len(index.numbers) != documents + 1 and not adopted):
        raise _damaged(path, f"is the index of {len(index.lengths):,} documents, and {documents:,} were written")
    return index


def open_any_index(path: Path, documents: int | None = None) -> Index:
    """The index of a dataset, of whatever size; `documents` are named in errors. Raises as `open_index`."""
    try:
        data = numpy.memmap(path, mode="r")
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError:  # an empty file cannot be mapped
        raise _damaged(path, "is empty") from None
    header = data[: IDX_HEADER.size].tobytes().ljust(IDX_HEADER.size, b"\0")
    magic, version, code, sequences, numbers = IDX_HEADER.unpack(header)
    if (magic, version) != (IDX_MAGIC, 1) or code not in DTYPES:
        raise _damaged(path, "is not the index of a dataset")
    if len(data) != IDX_HEADER.size + 12 * sequences + 8 * numbers or not numbers:
        wanted = sequences if documents is None else documents
        raise _damaged(path, f"has {len(data):,} bytes, which is not the index of {wanted:,} documents")
    ends = [IDX_HEADER.size + size * sequences for size in (0, 4, 12)]
    lengths, places = data[ends[0] : ends[1]].view("<i4"), data[ends[1] : ends[2]].view("<i8")
    return Index(path, numpy.dtype(DTYPES[code]), lengths, places, data[ends[2] :].view("<i8"))


def id_dtype(vocab_size: int) -> type[numpy.integer]:
    """What ids of a vocabulary of this size are stored as, as megatron-core chooses."""
    return numpy.uint16 if vocab_size < SMALL_VOCABULARY else numpy.int32


def write_index(path: Path, lengths: Path, dtype: numpy.dtype[numpy.integer]) -> None:
    """Write the index of documents whose lengths, int32 one after the other, are the file `lengths`."""
    documents = lengths.stat().st_size // 4
    code = next(code for code, name in DTYPES.items() if numpy.dtype(name) == dtype)
    counted = numpy.memmap(lengths, "<i4", mode="r")
    with path.open("wb") as out:
        out.write(IDX_HEADER.pack(IDX_MAGIC, 1, code, documents, documents + 1))
        out.write(counted.data)
        place = 0
        for first in range(0, documents, CHECKED_AT_ONCE):
            part = counted[first : first + CHECKED_AT_ONCE].astype("<i8") * dtype.itemsize
            out.write((place + numpy.cumsum(part) - part).astype("<i8").tobytes())
            place += int(part.sum())
        for first in range(0, documents + 1, CHECKED_AT_ONCE):
            out.write(numpy.arange(first, min(first + CHECKED_AT_ONCE, documents + 1), dtype="<i8").tobytes())


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path} {what}: damaged, or of another dataset; build it again")
