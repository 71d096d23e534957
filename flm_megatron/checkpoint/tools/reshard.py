"""A checkpoint copied to other files: merged, or one set of files for each rank of a target layout."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from flm_megatron.checkpoint.files.at_url import remove_at_url
from flm_megatron.checkpoint.files.destination import reserved
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo, split_name
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.sharding.layout import rank_regions
from flm_megatron.checkpoint.torch_dist.shard_file import SourceRegion
from flm_megatron.checkpoint.torch_dist.writer import LARGEST_CHUNK, copy_checkpoint, write_checkpoint
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.progress import progress_bar
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.storage.path import ObjectPath


def stored_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all values."""
    return sum(Region.whole(info.shape).numel * info.dtype.itemsize for info in tensors.values())


def reshard(
    checkpoint: LogicalCheckpoint,
    path: Path,
    processes: Processes,
    manifest: Manifest,
    target: tuple[ModelConfig, ParallelConfig] | None = None,
) -> Manifest:
    """Copy `checkpoint` to the new `torch_dist` folder `path`; returns `manifest` as it was written, with what is in
    it.

    Without `target` the tensors are spread evenly over one file for each process that works on it; with it, rank r of
    the target's tensor x pipeline layout finds what it will load in the files `__r_*.distcp`.

    Raises RequestError if `path` exists or is being written, if the disk is too small, or if the model cannot be
    split so.
    """
    nbytes = stored_bytes(checkpoint.tensors)
    with reserved(path, processes, nbytes), progress_bar("reshard", nbytes, processes) as moved:
        if target is None:
            return copy_checkpoint(checkpoint, path, manifest, progress=moved)
        shards = {
            name: _source_regions(checkpoint, regions)
            for number, (name, regions) in enumerate(_target_files(checkpoint, *target).items())
            if number % processes.size == processes.rank
        }
        return write_checkpoint(path, checkpoint.tensors, shards, manifest, progress=moved)


def require_unchanged(before: Mapping[str, str], after: Mapping[str, str], path: Path, processes: Processes) -> None:
    """Check that the copy at `path` has the hashes, by tensor, that its source has; else it is removed.

    Raises:
        DamagedError: a tensor has another one.
    """
    changed = [name for name in before if after.get(name) != before[name]]
    if changed and processes.rank == 0:
        remove_at_url(path) if isinstance(path, ObjectPath) else shutil.rmtree(path)
    if changed:
        raise DamagedError(f"{changed[0]}: its values are not those that were recorded for the source; {path} removed")


def _target_files(
    checkpoint: LogicalCheckpoint, model: ModelConfig, parallel: ParallelConfig
) -> dict[str, list[tuple[str, Region]]]:
    """Regions that go into each file; a region that several ranks hold goes to the first of them."""
    known = set()
    files: dict[str, list[tuple[str, Region]]] = {}
    for rank in range(parallel.model_size):
        regions = rank_regions(model, parallel, rank % parallel.tensor, rank // parallel.tensor)
        for name in checkpoint.tensors:
            for region in regions.get(split_name(name)[1], []):
                if region.numel and (name, region) not in known:
                    known.add((name, region))
                    files.setdefault(f"__{rank}_0.distcp", []).append((name, region))
    missing = set(checkpoint.tensors) - {name for regions in files.values() for name, _ in regions}
    if missing:
        raise RequestError(f"{min(missing)} is not a tensor of the configured model, so it has no place in a layout")
    return files


def _source_regions(checkpoint: LogicalCheckpoint, regions: list[tuple[str, Region]]) -> Iterator[SourceRegion]:
    for name, region in regions:
        for sub in split_region(region, LARGEST_CHUNK // checkpoint.tensors[name].dtype.itemsize):
            yield SourceRegion(name, sub, partial(checkpoint.read, name))
