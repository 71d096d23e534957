"""One `.distcp` file: rectangles of logical tensors written one after the other, with checksums made on the way."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flm_megatron.checkpoint.checksum import combine_crc32
from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.logical_hash import partial_hash
from flm_megatron.checkpoint.stored_array import as_bytes
from flm_megatron.checkpoint.tensor_record import encode
from flm_megatron.errors import RequestError


@dataclass(frozen=True)
class Rectangle:
    """A region of a logical tensor that is to be written; `values()` gives its values when their turn comes."""

    name: str
    region: Region
    values: Callable[[], torch.Tensor]


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
    """Write one file and add it to `written`; the values of two rectangles at most are in memory.

    While one rectangle goes to the disk the next is made. Raises RequestError when the disk is full.
    """
    with _disk_errors(path), ThreadPoolExecutor(1) as executor, path.open("wb", buffering=0) as stream:
        shard, pending = _Shard(stream.fileno()), None
        for rectangle in rectangles:
            info = tensors[rectangle.name]
            values = rectangle.values().detach().cpu().contiguous()
            assert tuple(values.shape) == rectangle.region.sizes, f"{rectangle}: values of shape {tuple(values.shape)}"
            assert values.dtype == info.dtype, f"{rectangle}: values of {values.dtype} instead of {info.dtype}"
            share = partial_hash(info.shape, rectangle.region, values)
            written.hashes[rectangle.name] = written.hashes.get(rectangle.name, 0) + share
            _wait(pending)
            place = shard.reserve(values)
            written.records.append(Record(rectangle.name, rectangle.region, path.name, *place))
            pending = executor.submit(shard.append, values)
            if progress:
                progress(values.nbytes)
        _wait(pending)
        os.fsync(stream.fileno())
    written.files[path.name] = {"size": shard.size, "crc32": f"{shard.crc:08x}"}


class _Shard:
    """An open file and its checksum so far."""

    def __init__(self, fd: int) -> None:
        self.fd, self.size, self.crc = fd, 0, 0

    def reserve(self, values: torch.Tensor) -> tuple[int, int]:
        """Offset and length that the record of `values` will have."""
        head, tail = encode(values.dtype, tuple(values.shape), 0)
        return self.size, len(head) + values.nbytes + len(tail)

    def append(self, values: torch.Tensor) -> None:
        """Write one record."""
        data = as_bytes(values) if values.numel() else memoryview(b"")
        crc = zlib.crc32(data)
        head, tail = encode(values.dtype, tuple(values.shape), crc)
        self.crc = combine_crc32(zlib.crc32(head, self.crc), crc, data.nbytes)
        self.crc = zlib.crc32(tail, self.crc)
        for part in (head, data, tail):
            self._write(memoryview(part))

    def _write(self, data: memoryview) -> None:
        self.size += data.nbytes
        while data.nbytes:
            data = data[os.write(self.fd, data) :]


def _wait(pending: Future[None] | None) -> None:
    if pending is not None:
        pending.result()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
