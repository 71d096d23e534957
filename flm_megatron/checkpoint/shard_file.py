"""One `.distcp` file: rectangles of logical tensors written one after the other, with checksums made on the way."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flm_megatron.checkpoint.checksum import combine_crc32
from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.logical_hash import MODULUS, partial_hash
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.stored_array import as_bytes
from flm_megatron.checkpoint.tensor_record import encode
from flm_megatron.errors import RequestError

PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Rectangle:
    """A region of a logical tensor that is to be written as one record, of less than 2 GiB.

    `values(part)` gives the values of a part of it, a region of the same tensor, when its turn comes.
    """

    name: str
    region: Region
    values: Callable[[Region], torch.Tensor]


@dataclass(frozen=True)
class Record:
    """A rectangle that was written, and where it lies."""

    name: str
    region: Region
    file: str
    offset: int
    length: int


@dataclass
class Written:
    """What one process wrote: its tensors, records, size and CRC-32 of each file, and shares of the tensors' hashes."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    files: dict[str, dict[str, int | str]] = field(default_factory=dict)
    hashes: dict[str, int] = field(default_factory=dict)


def write_shard(
    path: Path,
    rectangles: Iterable[Rectangle],
    tensors: Mapping[str, TensorInfo],
    written: Written,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write one file and add it to `written`; three pieces of 8 MiB at most are in memory.

    While one piece goes to the disk the next is made. Raises RequestError when the disk is full.
    """
    with _disk_errors(path), path.open("wb", buffering=0) as stream, ThreadPoolExecutor(1) as executor:
        shard = _Shard(stream.fileno())
        for rectangle in rectangles:
            info = tensors[rectangle.name]
            offset, pending = shard.size, executor.submit(shard.begin, info.dtype, rectangle.region.sizes)
            share = 0
            for part in split_region(rectangle.region, PIECE_BYTES // info.dtype.itemsize):
                values = _values(rectangle, part, info)
                share += partial_hash(info.shape, part, values)
                pending.result()
                pending = executor.submit(shard.append, values)
                if progress:
                    progress(values.nbytes)
            pending.result()
            shard.end()
            written.hashes[rectangle.name] = (written.hashes.get(rectangle.name, 0) + share) % MODULUS
            written.records.append(Record(rectangle.name, rectangle.region, path.name, offset, shard.size - offset))
        os.fsync(stream.fileno())
    written.files[path.name] = {"size": shard.size, "crc32": f"{shard.crc:08x}"}


def _values(rectangle: Rectangle, part: Region, info: TensorInfo) -> torch.Tensor:
    values = rectangle.values(part).detach().cpu().contiguous()
    assert tuple(values.shape) == part.sizes, f"{rectangle}: values of shape {tuple(values.shape)} for {part}"
    assert values.dtype == info.dtype, f"{rectangle}: values of {values.dtype} instead of {info.dtype}"
    return values


class _Shard:
    """An open file and its checksum so far. A record's head is written last: it holds the checksum of its values."""

    def __init__(self, fd: int) -> None:
        self.fd, self.size, self.crc = fd, 0, 0

    def begin(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Leave room for the head of a record."""
        self.dtype, self.shape = dtype, shape
        self.data_crc, self.data_bytes = 0, 0
        self.start, self.size = self.size, self.size + len(encode(dtype, shape, 0)[0])

    def append(self, values: torch.Tensor) -> None:
        """Write the record's next values."""
        if values.numel():
            data = as_bytes(values)
            self.data_crc = zlib.crc32(data, self.data_crc)
            self.data_bytes += data.nbytes
            self._write(data)

    def end(self) -> None:
        """Write head and tail of the record."""
        head, tail = encode(self.dtype, self.shape, self.data_crc)
        _write_at(self.fd, memoryview(head), self.start)
        self._write(memoryview(tail))
        self.crc = combine_crc32(zlib.crc32(head, self.crc), self.data_crc, self.data_bytes)
        self.crc = zlib.crc32(tail, self.crc)

    def _write(self, data: memoryview) -> None:
        _write_at(self.fd, data, self.size)
        self.size += data.nbytes


def _write_at(fd: int, data: memoryview, position: int) -> None:
    while data.nbytes:
        count = os.pwrite(fd, data, position)
        data, position = data[count:], position + count


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
