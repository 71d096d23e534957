"""A row-major array of plain bytes inside a file, of which any region can be read or written in place."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.block_checksums import (
    CheckedFile,
    CheckedRun,
    Source,
    read_fully,
    size_of,
    source_of,
)
from flm_megatron.checkpoint.files.direct_file import write_at
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.without_values import stand_in
from flm_megatron.errors import DamagedError, read_error

DENSE = 4
"""Values read for each value wanted, up to which reading a region in one run is faster than page by page."""


@dataclass(frozen=True)
class StoredArray:
    """The location of an array: `shape` values of `dtype` from byte `offset` of `path` on.

    With `checked`, whatever is read is checked against the checksums of the file's blocks, or its own.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    checked: CheckedFile | CheckedRun | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, region: Region | None = None) -> torch.Tensor:
        """A copy of `region`, of shape `region.sizes`; only its bytes are read and nothing stays mapped.

        Raises DamagedError when the file is missing or ends before the array does, or its bytes have changed;
        RequestError when its disk does not answer.
        """
        region = region or Region.whole(self.shape)
        unread = stand_in(self.path, region.sizes, self.dtype)
        if unread is not None:
            return unread
        out = torch.empty(region.sizes, dtype=self.dtype)
        if not region.numel:
            return out
        try:
            with self.path.open("rb", buffering=0) as file:
                source = source_of(file)
                if size_of(source) < self.offset + self.nbytes:
                    raise DamagedError(f"{self.path}: the file ends before its data does (truncated?)")
                if is_contiguous(region, self.shape):
                    self._read_run(source, _start(region, self.shape), out)
                else:
                    out = self._read_strided(source, region)
        except OSError as error:
            raise read_error(self.path, error) from error
        return out

    def write(self, fd: int, values: torch.Tensor, region: Region) -> None:
        """Write `values` (shape `region.sizes`) in place through the open descriptor `fd`; the region must be one run.

        Raises OSError as `os.pwrite` does.
        """
        assert is_contiguous(region, self.shape), f"{region} is not one run of bytes of {self.shape}"
        assert values.dtype == self.dtype and tuple(values.shape) == region.sizes
        write_at(fd, as_bytes(values), self.offset + _start(region, self.shape) * self.dtype.itemsize)

    def _read_run(self, fd: Source, start: int, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` with the values from index `start` on."""
        data, position = as_bytes(out), self.offset + start * self.dtype.itemsize
        if self.checked is not None:
            self.checked.read_into(fd, data, position)
        else:
            read_fully(fd, data, position, self.path)
        return out

    def _read_strided(self, fd: Source, region: Region) -> torch.Tensor:
        """Read all that lies between the first and the last value, unless most of it would be passed over.

        (Blocks with checksums are read whole: there is nothing to be saved by passing over parts of them.)
        """
        start, end = span(region, self.shape)
        if end - start > DENSE * region.numel and isinstance(fd, int) and self._may_map(fd):
            return self._read_mapped(fd, region)
        return out_of_run(self._read_run(fd, start, torch.empty(end - start, dtype=self.dtype)), region, self.shape)

    def _may_map(self, fd: int) -> bool:
        """Whether parts of the file can be read as they are; a run with one checksum is checked first."""
        if isinstance(self.checked, CheckedRun):
            self.checked.check(fd)
        return not isinstance(self.checked, CheckedFile)

    def _read_mapped(self, fd: int, region: Region) -> torch.Tensor:
        """Map the file for the time of the copy: only the pages that hold the region are touched."""
        start = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = self.offset + self.nbytes - start
        mapped = mmap.mmap(fd, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
        mapped.madvise(mmap.MADV_RANDOM)
        size = self.dtype.itemsize
        raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=self.offset - start, count=self.nbytes)
        in_bytes = Region(
            (*region.offsets[:-1], region.offsets[-1] * size), (*region.sizes[:-1], region.sizes[-1] * size)
        )
        rows = raw.view(*self.shape[:-1], self.shape[-1] * size)
        return rows[in_bytes.slices].clone(memory_format=torch.contiguous_format).view(self.dtype)


def as_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy (numpy has no bfloat16, so through uint8)."""
    return memoryview(values.reshape(-1).view(torch.uint8).numpy().data)


def is_contiguous(region: Region, shape: tuple[int, ...]) -> bool:
    """Whether `region` is one run of a row-major array of `shape`."""
    axis = next((i for i, n in enumerate(region.sizes) if n != 1), len(shape))
    return region.sizes[axis + 1 :] == tuple(shape[axis + 1 :])


def span(region: Region, shape: tuple[int, ...]) -> tuple[int, int]:
    """Index of the first value of a region of a row-major array of `shape`, and one beyond its last."""
    return _start(region, shape), _end(region, shape)


def out_of_run(run: torch.Tensor, region: Region, shape: tuple[int, ...]) -> torch.Tensor:
    """The region, from all values that lie in its `span`."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return run.as_strided(region.sizes, strides).contiguous()


def _end(region: Region, shape: tuple[int, ...]) -> int:
    """One beyond the last value of a region."""
    last = tuple(offset + size - 1 for offset, size in zip(region.offsets, region.sizes, strict=True))
    return _start(Region(last, region.sizes), shape) + 1


def _start(region: Region, shape: tuple[int, ...]) -> int:
    index = 0
    for offset, size in zip(region.offsets, shape, strict=True):
        index = index * size + offset
    return index
