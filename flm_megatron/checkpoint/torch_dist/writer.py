"""Writes `torch_dist` folders from any number of processes, in bounded memory, completely or not at all.

The files are those that torch.distributed.checkpoint and megatron-core write and read. They are written here because
their writers copy every tensor several times, check the plan in quadratic time and start a helper process.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from flm_megatron.checkpoint.files.destination import new_folder, publish, write_errors, write_small
from flm_megatron.checkpoint.files.manifest import MANIFEST, file_entry, manifest_text
from flm_megatron.checkpoint.logical import EXP_AVG, STATE_PREFIXES, LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import VERSION, Manifest
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.torch_dist.common import COMMON, OURS
from flm_megatron.checkpoint.torch_dist.logical_hash import combine_hashes, tensor_hash
from flm_megatron.checkpoint.torch_dist.reader import FORMAT, METADATA
from flm_megatron.checkpoint.torch_dist.shard_file import Record, SourceRegion, Written, write_shard
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import FlmError
from flm_megatron.storage.path import location

KIND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
SMALLEST_CHUNK, LARGEST_CHUNK = 16 * 2**20, 2**30
CHUNKS_PER_PROCESS = 16
FILE_BYTES = 8 * 2**30


def copy_checkpoint(
    checkpoint: LogicalCheckpoint,
    path: str | Path,
    manifest: Manifest | None = None,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
    chunk_bytes: int | None = None,
) -> Manifest:
    """Copy a checkpoint into a new checkpoint folder; its tensors are divided over `processes` (all, if not given).

    `manifest` is the checkpoint's own if not given. Tensors are streamed in chunks of at most `chunk_bytes`
    (`chunk_size`'s if not given). `progress` is called with the bytes done since its last call. Returns the manifest
    that was written. Raises as `write_checkpoint`, and whatever reading the checkpoint raises.
    """
    processes = processes or Processes()
    files = plan_files(checkpoint.tensors, processes.rank, processes.size, chunk_bytes)
    shards = {
        name: [SourceRegion(tensor, region, partial(checkpoint.read, tensor)) for tensor, region in regions]
        for name, regions in files.items()
    }
    return write_checkpoint(path, checkpoint.tensors, shards, manifest or checkpoint.manifest, processes, progress)


def plan_files(
    tensors: Mapping[str, TensorInfo], rank: int = 0, size: int = 1, chunk_bytes: int | None = None
) -> dict[str, list[tuple[str, Region]]]:
    """The files that `rank` of `size` processes writes, and the regions in each: about equal bytes for every rank."""
    total = sum(Region.whole(i.shape).numel * i.dtype.itemsize for i in tensors.values())
    chunk_bytes = chunk_bytes or chunk_size(total, size)
    files: dict[str, list[tuple[str, Region]]] = {}
    position = 0
    for name, info in tensors.items():
        for region in split_region(Region.whole(info.shape), chunk_bytes // info.dtype.itemsize):
            if position * size // max(total, 1) == rank:
                number = (position - rank * total // size) // FILE_BYTES
                files.setdefault(f"__{rank}_{number}.distcp", []).append((name, region))
            position += region.numel * info.dtype.itemsize
    return files


def chunk_size(total_bytes: int, processes: int) -> int:
    """Bytes of a chunk: small enough to divide evenly, large enough for few entries in the metadata."""
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, total_bytes // (processes * CHUNKS_PER_PROCESS)))


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, TensorInfo],
    shards: Mapping[str, Iterable[SourceRegion]],
    manifest: Manifest,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Write a checkpoint folder together with the others of `processes` (of all, if not given).

    `tensors` are at least those in `shards`, which are this process's files by name (unique over all processes), each
    with its regions; together the regions of all processes cover every tensor once. Everything is written
    under a temporary name, synchronised to the disk, and renamed when it is whole. Returns the manifest; all but the
    first process get it without its `files`, of which a large run has tens of thousands.

    Raises:
        RequestError: the destination exists or cannot be written (disk full, no permission).
        FlmError: another process failed, or the regions do not cover a tensor. Nothing is left at the destination.
    """
    path, processes = location(path), processes or Processes()
    with new_folder(path, processes) as folder:
        results = processes.together(lambda: _write_shards(folder, shards, tensors, progress))
        whole: list[Manifest] = []

        def finish() -> Manifest:
            """Finish the folder; returns what every process gets."""
            whole.append(_finish(folder, path, results, manifest))
            return whole[0] | Manifest(files={})

        told = processes.on_first(finish)
        return whole[0] if whole else told


def _write_shards(
    folder: Path,
    shards: Mapping[str, Iterable[SourceRegion]],
    tensors: Mapping[str, TensorInfo],
    progress: Callable[[int], None] | None,
) -> Written:
    written = Written(dict(tensors))
    for name, regions in shards.items():
        write_shard(folder / name, regions, tensors, written, progress)
    return written


def _finish(folder: Path, path: Path, results: list[Written], manifest: Manifest) -> Manifest:
    tensors = {name: info for result in results for name, info in result.tensors.items()}
    records = [record for result in results for record in result.records]
    check_cover(tensors, records)
    files = {name: entry for result in results for name, entry in result.files.items()}
    with write_errors(path):
        for name, data in _small_files(tensors, records, manifest.position.step or 0).items():
            write_small(folder / name, data)
            files[name] = file_entry(data)
        manifest |= _contents(tensors, results) | Manifest(files=files)
    publish(folder, path, {MANIFEST: manifest_text(manifest).encode()})
    return manifest


def _small_files(tensors: Mapping[str, TensorInfo], records: Iterable[Record], step: int) -> dict[str, bytes]:
    """The other files of every folder of this format, to be written in this order: COMMON, which says that it is ours
    and so needs a manifest, before METADATA, without which it is no checkpoint."""
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0, "iteration": step, OURS: VERSION}, common)
    return {
        COMMON: common.getvalue(),
        METADATA: pickle.dumps(_metadata(tensors, records)),
        FORMAT: json.dumps(KIND).encode(),
    }


def _contents(tensors: Mapping[str, TensorInfo], results: list[Written]) -> Manifest:
    """The entries of the manifest that follow from what was written."""
    totals = {name: sum(result.hashes.get(name, 0) for result in results) for name in tensors}
    hashes = {name: tensor_hash(info, totals[name]) for name, info in tensors.items()}
    return Manifest(
        optimizer="logical" if any(name.startswith(EXP_AVG) for name in tensors) else "none",
        tensors=hashes,
        weights_hash=combine_hashes({n: h for n, h in hashes.items() if not n.startswith(STATE_PREFIXES)}),
        logical_hash=combine_hashes(hashes),
    )


def check_cover(tensors: Mapping[str, TensorInfo], records: Iterable[Record]) -> None:
    """Raise FlmError unless the records lie in their tensors and hold as many values as these, each corner once."""
    volumes, corners = dict.fromkeys(tensors, 0), set()
    for record in records:
        whole = Region.whole(tensors[record.name].shape)
        corner = (record.name, record.region.offsets)
        outside = whole.numel and record.region.intersect(whole) != record.region
        if outside or corner in corners:
            raise FlmError(f"{record.name}: region {record.region} lies outside of it or is written twice")
        volumes[record.name] += record.region.numel
        corners.add(corner)
    for name, info in tensors.items():
        if volumes[name] != Region.whole(info.shape).numel:
            raise FlmError(f"{name}: {volumes[name]} of its {Region.whole(info.shape).numel} values were given")


def _metadata(tensors: Mapping[str, TensorInfo], records: Iterable[Record]) -> Metadata:
    entries = {
        name: TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), [])
        for name, info in tensors.items()
    }
    storage = {}
    for record in records:
        offsets, sizes = torch.Size(record.region.offsets), torch.Size(record.region.sizes)
        chunks = entries[record.name].chunks
        storage[MetadataIndex(record.name, offsets, len(chunks))] = _StorageInfo(
            record.file, record.offset, record.length
        )
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return Metadata(dict(entries), planner_data={}, storage_data=storage, storage_meta=StorageMeta())
