"""One `.distcp` file: rectangles of logical tensors written one after the other, with checksums made on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.block_checksums import SUFFIX, BlockSums, Fragment, combined, fragments
from flm_megatron.checkpoint.files.direct_file import DirectFile
from flm_megatron.checkpoint.files.in_order import WORKERS, in_order
from flm_megatron.checkpoint.files.manifest import entry, file_entry
from flm_megatron.checkpoint.files.stored_array import as_bytes
from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.torch_dist.logical_hash import MODULUS, partial_hash
from flm_megatron.checkpoint.torch_dist.tensor_record import encode
from flm_megatron.durable import write_file
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


@dataclass(frozen=True)
class _Part:
    """A piece of a rectangle's values and where in the file it goes; `last` if the rectangle ends with it."""

    rectangle: Rectangle
    info: TensorInfo
    region: Region
    record: int
    position: int
    last: bool

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.region.numel * self.info.dtype.itemsize


def write_shard(
    path: Path,
    rectangles: Iterable[Rectangle],
    tensors: Mapping[str, TensorInfo],
    written: Written,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write one file and add it to `written`; each of WORKERS threads holds a piece of 8 MiB and a copy of it.

    It makes, hashes and writes pieces of its own. Raises RequestError when the disk is full.
    """
    sums, whole = BlockSums(), (0, 0)
    with _disk_errors(path), DirectFile(path) as file, ThreadPoolExecutor(WORKERS) as executor:
        share, data = 0, list[Fragment]()
        done = in_order(executor, partial(_write_part, file), _parts(rectangles, tensors))
        for part, (part_share, part_data) in done:
            share = (share + part_share) % MODULUS
            data += part_data
            if progress:
                progress(part.nbytes)
            if part.last:
                name, region = part.rectangle.name, part.rectangle.region
                record = _end_record(file, part, data)
                sums.add(record)
                size = combined(record)[1]
                written.hashes[name] = (written.hashes.get(name, 0) + share) % MODULUS
                written.records.append(Record(name, region, path.name, whole[1], size))
                whole, share, data = combined([whole, *record]), 0, []
        stored = sums.to_bytes()
        write_file(path.with_name(path.name + SUFFIX), stored)
    written.files |= {path.name: entry(*whole), path.name + SUFFIX: file_entry(stored)}


def _parts(rectangles: Iterable[Rectangle], tensors: Mapping[str, TensorInfo]) -> Iterator[_Part]:
    """The pieces of all rectangles in the order in which they lie in the file."""
    record = 0
    for rectangle in rectangles:
        info = tensors[rectangle.name]
        head, tail = encode(info.dtype, rectangle.region.sizes, 0)
        position = record + len(head)
        end = position + rectangle.region.numel * info.dtype.itemsize
        for region in split_region(rectangle.region, PIECE_BYTES // info.dtype.itemsize):
            part = _Part(rectangle, info, region, record, position, last=False)
            position += part.nbytes
            yield replace(part, last=position == end)
        record = end + len(tail)


def _write_part(file: DirectFile, part: _Part) -> tuple[int, list[Fragment]]:
    """Make and write one piece: its share in the tensor's hash, and the checksums of its bytes."""
    values = part.rectangle.values(part.region).detach().cpu().contiguous()
    assert tuple(values.shape) == part.region.sizes, f"{part}: values of shape {tuple(values.shape)}"
    assert values.dtype == part.info.dtype, f"{part}: values of {values.dtype}"
    if not part.nbytes:
        return 0, []
    data = as_bytes(values)
    file.write(data, part.position)
    return partial_hash(part.info.shape, part.region, values), fragments(data, part.position)


def _end_record(file: DirectFile, part: _Part, data: list[Fragment]) -> list[Fragment]:
    """Write the head and the tail of the record that ends with `part`; the head holds the CRC-32 of the values.

    Returns the checksums of the whole record.
    """
    head, tail = encode(part.info.dtype, part.rectangle.region.sizes, combined(data)[0])
    after = part.position + part.nbytes
    file.write(memoryview(head), part.record)
    file.write(memoryview(tail), after)
    return [*fragments(memoryview(head), part.record), *data, *fragments(memoryview(tail), after)]


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
