"""One `.distcp` file: regions of logical tensors written one after the other, with checksums made on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.block_checksums import SUFFIX, BlockSums, Fragment, combined, fragments
from flm_megatron.checkpoint.files.destination import write_small
from flm_megatron.checkpoint.files.direct_file import DirectFile
from flm_megatron.checkpoint.files.in_order import WORKERS, in_order
from flm_megatron.checkpoint.files.manifest import entry, file_entry
from flm_megatron.checkpoint.files.stored_array import as_bytes
from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.manifest import FileEntry
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.torch_dist.logical_hash import MODULUS, partial_hash
from flm_megatron.checkpoint.torch_dist.tensor_record import encode
from flm_megatron.errors import RequestError
from flm_megatron.storage.path import ObjectPath
from flm_megatron.storage.writing import Writer, object_writer

BUFFER_BYTES = 8 * 2**20


@dataclass(frozen=True)
class SourceRegion:
    """A region of a logical tensor that is to be written as one record, of less than 2 GiB.

    `values(region)` gives the values of any region inside it when its turn comes.
    """

    name: str
    region: Region
    values: Callable[[Region], torch.Tensor]


@dataclass(frozen=True)
class Record:
    """A region that was written, and where it lies."""

    name: str
    region: Region
    file: str
    offset: int
    length: int


@dataclass
class Written:
    """What one process wrote: tensors, records, size and CRC-32 of each file, and its summands of tensors' hashes."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)
    hashes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _SubRegion:
    """A region inside of `source` and where in the file its values go; `last` if `source` ends with it."""

    source: SourceRegion
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
    regions: Iterable[SourceRegion],
    tensors: Mapping[str, TensorInfo],
    written: Written,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write one file and add it to `written`; each of WORKERS threads holds 8 MiB of values and a copy of them.

    Raises RequestError when the disk is full.
    """
    sums, whole = BlockSums(), (0, 0)
    with _disk_errors(path), _opened(path) as file, ThreadPoolExecutor(WORKERS) as executor:
        hashed, data = 0, list[Fragment]()
        done = in_order(executor, partial(_write_sub_region, file), _sub_regions(regions, tensors))
        for sub, (sub_hash, sub_data) in done:
            hashed = (hashed + sub_hash) % MODULUS
            data += sub_data
            if progress:
                progress(sub.nbytes)
            if sub.last:
                name, region = sub.source.name, sub.source.region
                record = _end_record(file, sub, data)
                sums.add(record)
                size = combined(record)[1]
                written.hashes[name] = (written.hashes.get(name, 0) + hashed) % MODULUS
                written.records.append(Record(name, region, path.name, whole[1], size))
                whole, hashed, data = combined([whole, *record]), 0, []
        stored = sums.to_bytes()
        write_small(path.with_name(path.name + SUFFIX), stored)
    written.files |= {path.name: entry(*whole), path.name + SUFFIX: file_entry(stored)}


def _opened(path: Path) -> Writer:
    """The new file, or the new object, which is sent while it is written."""
    return object_writer(str(path)) if isinstance(path, ObjectPath) else DirectFile(path)


def _sub_regions(regions: Iterable[SourceRegion], tensors: Mapping[str, TensorInfo]) -> Iterator[_SubRegion]:
    """The regions cut to BUFFER_BYTES, in the order in which they lie in the file."""
    record = 0
    for source in regions:
        info = tensors[source.name]
        head, tail = encode(info.dtype, source.region.sizes, 0)
        position = record + len(head)
        end = position + source.region.numel * info.dtype.itemsize
        for region in split_region(source.region, BUFFER_BYTES // info.dtype.itemsize):
            sub = _SubRegion(source, info, region, record, position, last=False)
            position += sub.nbytes
            yield replace(sub, last=position == end)
        record = end + len(tail)


def _write_sub_region(file: Writer, sub: _SubRegion) -> tuple[int, list[Fragment]]:
    """Make and write the values of one region: its summand of the tensor's hash, and the checksums of its bytes."""
    values = sub.source.values(sub.region).detach().cpu().contiguous()
    assert tuple(values.shape) == sub.region.sizes, f"{sub}: values of shape {tuple(values.shape)}"
    assert values.dtype == sub.info.dtype, f"{sub}: values of {values.dtype}"
    if not sub.nbytes:
        return 0, []
    data = as_bytes(values)
    file.write(data, sub.position)
    return partial_hash(sub.info.shape, sub.region, values), fragments(data, sub.position)


def _end_record(file: Writer, sub: _SubRegion, data: list[Fragment]) -> list[Fragment]:
    """Write the head and the tail of the record that ends with `sub`; the head holds the CRC-32 of the values.

    Returns the checksums of the whole record.
    """
    head, tail = encode(sub.info.dtype, sub.source.region.sizes, combined(data)[0])
    after = sub.position + sub.nbytes
    file.write(memoryview(head), sub.record)
    file.write(memoryview(tail), after)
    return [*fragments(memoryview(head), sub.record), *data, *fragments(memoryview(tail), after)]


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
