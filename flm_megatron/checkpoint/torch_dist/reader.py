"""Reads megatron-core's `torch_dist` folders, ours and Megatron-LM's own, without a model or a process group."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.block_checksums import SUFFIX, CheckedFile, KeptBlocks
from flm_megatron.checkpoint.files.manifest import read_listed, read_manifest
from flm_megatron.checkpoint.files.stored_array import StoredArray, is_contiguous
from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.regions import slice_axis
from flm_megatron.checkpoint.torch_dist.chunk_index import ChunkIndex, StoredChunk
from flm_megatron.checkpoint.torch_dist.common import COMMON, foreign_position, read_common
from flm_megatron.checkpoint.torch_dist.metadata import StoredMetadata, StoredPlace, parse_metadata
from flm_megatron.checkpoint.torch_dist.tensor_record import locate
from flm_megatron.checkpoint.without_values import stand_in
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.json_text import parse_json
from flm_megatron.storage.path import location

METADATA = ".metadata"
FORMAT = "metadata.json"
SPAN_BYTES = 16 * 2**20  # of a file that are read or mapped at a time
# Megatron-LM's names of the same state, with the prefix it gives to one of several optimizers.
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(param|fp32_param|exp_avg|exp_avg_sq)\.(.+)")
STATE_NAMES = {"param": MASTER, "fp32_param": MASTER, "exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}
NAMELESS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.")
Strided = tuple[tuple[int, ...], tuple[int, ...], int]
"""Size, stride and offset of values in their storage."""


class TorchDistCheckpoint(LogicalCheckpoint):
    """A `torch_dist` folder. `nameless_optimizer` says that its optimizer state is in `dp_reshardable` buckets.

    Everything is checked while it is read: small files against the manifest, values against the checksums of their
    blocks. In folders of Megatron-LM, and of our versions before block checksums, a record is read through and checked
    against its own checksum when a region of it is read for the first time.

    Raises:
        RequestError: the folder is of a version that is not known.
        DamagedError: its metadata is missing, broken or changed, or names anything but data; or the folder is one of
            ours and has no manifest, which is written last.
    """

    def __init__(self, path: str | Path, blocks: bool = True) -> None:
        """Open a folder; without `blocks` block checksums are ignored and records checked against their own."""
        self.path, self._blocks = location(path), blocks
        manifest = read_manifest(self.path)
        metadata = _read_metadata(self.path, manifest)
        self.chunks: dict[str, list[StoredChunk]] = {}
        self._indices: dict[str, ChunkIndex[StoredChunk]] = {}
        self._arrays: dict[StoredChunk, tuple[StoredArray, Strided | None]] = {}
        self.tensors: Mapping[str, TensorInfo] = self._read_tensors(metadata)
        self.nameless_optimizer = any(NAMELESS.match(name) for name in metadata.entries)
        self._files = manifest.files if manifest else {}
        self._checked: dict[str, CheckedFile | None] = {}
        self._kept = KeptBlocks()
        self._metadata = metadata
        if COMMON in self._files:
            read_listed(self.path, COMMON, manifest)
        self.manifest = manifest or Manifest(position=foreign_position(self.path, self.common_state()))

    def common_state(self) -> dict[str, object] | None:
        """What a checkpoint of Megatron-LM holds beside tensors; see `common.read_common`."""
        return read_common(self.path, self._metadata)

    def has_optimizer(self) -> bool:
        """Whether it has moments by name. Raises RequestError for `dp_reshardable` optimizer state."""
        if self.nameless_optimizer:
            raise self._nameless()
        return super().has_optimizer()

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of a region; only its bytes (for a range of columns: the pages they lie in) are read."""
        info = self._info(name)
        region = region or Region.whole(info.shape)
        if region.intersect(Region.whole(info.shape)) != region and region.numel:
            raise RequestError(f"{name}: region {region} does not lie in its shape {info.shape}")
        met = self._meeting(name, region)
        if sum(common.numel for _, common in met) != region.numel:
            raise DamagedError(f"{self.path}: {name} is not stored as a whole: part of {region} is missing", self.path)
        if len(met) == 1:
            return self._read_chunk(name, *met[0])
        out = torch.empty(region.sizes, dtype=info.dtype)
        for chunk, common in met:
            out[common.within(region).slices] = self._read_chunk(name, chunk, common)
        return out

    def _meeting(self, name: str, region: Region) -> list[tuple[StoredChunk, Region]]:
        if name not in self._indices:
            self._indices[name] = ChunkIndex(self.tensors[name].shape, self.chunks[name])
        return self._indices[name].meeting(region)

    def _info(self, name: str) -> TensorInfo:
        if name in self.tensors:
            return self.tensors[name]
        if self.nameless_optimizer and STATE.match(name):
            raise self._nameless()
        raise RequestError(f"{self.path} has no tensor {name}")

    def _nameless(self) -> RequestError:
        return RequestError(
            f"{self.path} keeps its optimizer state in nameless buckets (dp_reshardable), which only the layout that"
            " saved it can use: save it again as fully_reshardable, or use the weights alone"
        )

    def _read_chunk(self, name: str, chunk: StoredChunk, common: Region) -> torch.Tensor:
        inside = common.within(chunk.region)
        unread = stand_in(self.path / chunk.file, common.sizes, self.tensors[name].dtype)
        if unread is not None:
            return unread
        try:
            values, whole = self._array(chunk)
            if values.dtype != self.tensors[name].dtype:
                raise DamagedError(f"{values.path}: stored as {values.dtype}, not {self.tensors[name].dtype}")
            if whole is not None:
                flat = values.read().as_strided(*whole).reshape(chunk.region.sizes)
                return flat[inside.slices].clone()
            bounded = list(_bounded_regions(inside, values))
            if len(bounded) == 1:
                return values.read(inside)
            out = torch.empty(common.sizes, dtype=values.dtype)
            for sub in bounded:
                out[sub.within(inside).slices] = values.read(sub)
            return out
        except DamagedError as error:
            raise DamagedError(f"{name}: {error}", self.path) from error

    def _array(self, chunk: StoredChunk) -> tuple[StoredArray, Strided | None]:
        if chunk not in self._arrays:
            self._arrays[chunk] = _array(self.path / chunk.file, chunk, self._checked_file(chunk.file))
        return self._arrays[chunk]

    def _checked_file(self, name: str) -> CheckedFile | None:
        """A shard with the checksums of its blocks; none where they were not made."""
        if name not in self._checked:
            sums = name + SUFFIX
            known = self._blocks and sums in self._files
            data = read_listed(self.path, sums, self.manifest) if known else b""
            size = self._files[name].size if known else 0
            self._checked[name] = CheckedFile(self.path / name, size, data, self._kept) if known else None
        return self._checked[name]

    def _read_tensors(self, metadata: StoredMetadata) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for stored, entry in metadata.entries.items():
            if entry.dtype is None or NAMELESS.match(stored):
                continue  # bytes, never read, and buckets, which are of no use here
            match = STATE.fullmatch(stored)
            name = STATE_NAMES[match[1]] + match[2] if match else stored
            found[name] = TensorInfo(entry.size, entry.dtype)
            self.chunks[name] = [self._chunk(stored, Region(*chunk), metadata.places) for chunk in entry.chunks]
        return found

    def _chunk(
        self, stored: str, region: Region, places: Mapping[tuple[str, tuple[int, ...]], StoredPlace]
    ) -> StoredChunk:
        place = places.get((stored, region.offsets))
        if place is None:
            raise DamagedError(f"{self.path / METADATA}: no place is given for {stored} at {region.offsets}")
        if place.transformed:
            raise RequestError(f"{self.path}: {stored} is stored compressed or transformed, which cannot be read")
        return StoredChunk(region, place.relative_path, place.offset, place.length)


def _bounded_regions(inside: Region, values: StoredArray) -> Iterator[Region]:
    """Split a region into some that each span few bytes of the file, so that memory does not grow with the chunk."""
    if is_contiguous(inside, values.shape) or inside.numel == 0:
        yield inside
        return
    axis = next(i for i, n in enumerate(inside.sizes) if n > 1)
    row_bytes = values.nbytes // values.shape[axis]
    for outer in values.shape[:axis]:
        row_bytes //= outer
    step = max(1, SPAN_BYTES // max(1, row_bytes))
    for start in range(0, inside.sizes[axis], step):
        sub = slice_axis(inside, axis, start, min(step, inside.sizes[axis] - start))
        if sub.sizes[axis] == 1:
            yield from _bounded_regions(sub, values)
        else:
            yield sub


def _array(path: Path, chunk: StoredChunk, checked: CheckedFile | None) -> tuple[StoredArray, Strided | None]:
    """Where a chunk's values are; for values that are not stored row-major, also how to find them in the storage."""
    storage, tensor = locate(path, chunk.offset, chunk.length, checked)
    sizes = chunk.region.sizes
    numel, contiguous = 1, True
    for size, stride in zip(reversed(tensor.size), reversed(tensor.stride), strict=True):
        contiguous = contiguous and (size == 1 or stride == numel)
        numel *= size
    reach = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True)) + 1
    if numel != chunk.region.numel or min(tensor.offset, *tensor.stride, 0) < 0 or reach > tensor.storage_numel:
        raise DamagedError(f"{path}: holds a tensor of shape {tensor.size} where {sizes} is expected")
    if not contiguous:
        return storage, (tensor.size, tensor.stride, tensor.offset)
    offset = storage.offset + tensor.offset * tensor.dtype.itemsize
    return StoredArray(path, offset, sizes, tensor.dtype, storage.checked), None


def _read_metadata(path: Path, manifest: Manifest | None) -> StoredMetadata:
    kind: object = {"sharded_backend": "torch_dist"}  # a plain folder of torch.distributed.checkpoint does not say it
    if manifest or (path / FORMAT).exists():
        kind = parse_json(read_listed(path, FORMAT, manifest), str(path / FORMAT), DamagedError, strict=True)
    if not isinstance(kind, dict) or kind.get("sharded_backend") != "torch_dist":
        raise RequestError(f"{path} is not in the torch_dist format: {kind!r:.200}")
    if kind.get("sharded_backend_version", 1) != 1:
        raise RequestError(f"{path} is of version {kind['sharded_backend_version']!r:.80} of torch_dist; known is 1")
    return _parsed(read_listed(path, METADATA, manifest), path / METADATA, manifest)


def _parsed(data: bytes, file: Path, manifest: Manifest | None) -> StoredMetadata:
    """The content of a metadata file. If it is unchanged but cannot be parsed, a newer version wrote it."""
    try:
        return parse_metadata(data, str(file))
    except DamagedError as error:
        if manifest is None or METADATA not in manifest.files:
            raise
        raise RequestError(f"{error}; the file is as it was written, so this program is too old for it") from error
