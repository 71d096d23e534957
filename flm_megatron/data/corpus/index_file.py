"""The index of a dataset (PREFIX.idx), in megatron-core's layout: how long each document is and where it begins.

Magic, version, code of the type of ids, number of documents, that number + 1; then the documents' lengths in ids
(int32), their places in the .bin in bytes (int64), and their numbers, one after the last included (int64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy

from flm_megatron.errors import DamagedError, read_error

IDX_HEADER = struct.Struct("<9sQBQQ")
IDX_MAGIC = b"MMIDIDX\x00\x00"
ID_BYTES = {4: 4, 8: 2}
CHECKED_AT_ONCE = 2**20
"""Documents; so that memory does not grow with the index."""


@dataclass(frozen=True)
class Index:
    """What an index file holds, mapped: `lengths`, `places` and `numbers` of documents; `id_bytes` of one id."""

    path: Path
    id_bytes: int
    lengths: numpy.ndarray
    places: numpy.ndarray
    numbers: numpy.ndarray

    @property
    def end(self) -> int:
        """Where the last document ends in the .bin, in bytes."""
        return int(self.places[-1]) + int(self.lengths[-1]) * self.id_bytes

    def check(self) -> None:
        """Check every entry: documents lie one after the other, none is empty, and they are numbered in order.

        Reads all of it (20 bytes a document). Each entry follows from the others, so that one that has changed is
        found. Raises DamagedError.
        """
        place = 0
        for first in range(0, len(self.lengths), CHECKED_AT_ONCE):
            lengths = self.lengths[first : first + CHECKED_AT_ONCE].astype(numpy.int64)
            places = place + self.id_bytes * (numpy.cumsum(lengths) - lengths)
            last = first + len(lengths)
            wrong = (lengths <= 0) | (self.places[first:last] != places)
            wrong |= self.numbers[first:last] != numpy.arange(first, last)
            if wrong.any():
                raise _damaged(self.path, f"does not have document {first + int(wrong.argmax())} as it was written")
            place += self.id_bytes * int(lengths.sum())
        if self.numbers[-1] != len(self.lengths):
            raise _damaged(self.path, "does not end as it was written")


def open_index(path: Path, documents: int) -> Index:
    """The index of a dataset of so many documents. Raises DamagedError if the file is not that, RequestError when its
    disk does not answer."""
    try:
        data = numpy.memmap(path, mode="r")
    except OSError as error:
        raise read_error(path, error) from error
    if len(data) != IDX_HEADER.size + 20 * documents + 8:
        raise _damaged(path, f"has {len(data):,} bytes, which is not the index of {documents:,} documents")
    magic, version, code, sequences, numbers = IDX_HEADER.unpack(data[: IDX_HEADER.size].tobytes())
    if (magic, version) != (IDX_MAGIC, 1) or code not in ID_BYTES:
        raise _damaged(path, "is not the index of a dataset")
    if (sequences, numbers) != (documents, documents + 1):
        raise _damaged(path, f"is the index of {sequences:,} documents, and {documents:,} were written")
    ends = [IDX_HEADER.size + size * documents for size in (0, 4, 12)]
    lengths, places = data[ends[0] : ends[1]].view("<i4"), data[ends[1] : ends[2]].view("<i8")
    return Index(path, ID_BYTES[code], lengths, places, data[ends[2] :].view("<i8"))


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path} {what}: damaged, or of another dataset; build it again")
