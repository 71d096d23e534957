"""Any logical checkpoint's weights as a legacy Megatron-LM checkpoint of a given tensor x pipeline size, streaming."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flm_megatron.checkpoint.files.destination import destination, write_errors
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.files.torch_file import read_torch_file
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.manifest import UNRECORDED_LENGTH
from flm_megatron.checkpoint.megatron_legacy.arguments import arguments_of
from flm_megatron.checkpoint.megatron_legacy.reader import FILE, LATEST, LocalTensor, local_tensors
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.torch_dist.shard_file import BUFFER_BYTES
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.progress import progress_bar
from flm_megatron.errors import RequestError


def write_megatron_legacy(
    checkpoint: LogicalCheckpoint,
    path: Path,
    target: tuple[ModelConfig, ParallelConfig],
    processes: Processes,
    sequence_length: int = UNRECORDED_LENGTH,
) -> int:
    """Write the weights of `checkpoint` to the new folder `path` in Megatron-LM's legacy layout; returns their bytes.

    Every process writes the files of some ranks, one chunk in memory at a time. Padding rows of the vocabulary are
    zero. Raises RequestError if `path` exists or does not fit on its disk, or if the model cannot be split that way.
    """
    model, parallel = target
    if parallel.virtual_pipeline > 1:
        raise RequestError("the legacy layout is written without a virtual pipeline: give tensor and pipeline sizes")
    ranks = [(t, p) for p in range(parallel.pipeline) for t in range(parallel.tensor)]
    plans = {rank: local_tensors(model, parallel, *rank) for rank in ranks}
    nbytes = sum(_nbytes(checkpoint, tensors) for tensors in plans.values())
    at = checkpoint.manifest.position
    step = at.step or 0
    arguments = arguments_of(model, parallel, sequence_length, at.samples or 0)
    with destination(path, processes, nbytes) as folder, progress_bar("write", nbytes, processes) as moved:

        def write_own_files() -> None:
            """Write this process's files."""
            for rank in ranks[processes.rank :: processes.size]:
                file = folder / _iteration(step) / _rank_folder(rank, parallel) / FILE
                arrays = _lay_out(file, checkpoint, plans[rank], {"args": arguments, "iteration": step})
                _fill(file, checkpoint, plans[rank], arrays, moved)

        processes.together(write_errors(path)(write_own_files))
        latest = str(step) if step else "release"
        processes.on_first(write_errors(path)(lambda: (folder / LATEST).write_text(latest)))
    return nbytes


def _iteration(step: int) -> str:
    return f"iter_{step:07d}" if step else "release"


def _rank_folder(rank: tuple[int, int], parallel: ParallelConfig) -> str:
    return f"mp_rank_{rank[0]:02d}" + (f"_{rank[1]:03d}" if parallel.pipeline > 1 else "")


def _nbytes(checkpoint: LogicalCheckpoint, tensors: dict[str, LocalTensor]) -> int:
    return sum(
        Region.whole(local.shape).numel * checkpoint.tensors[local.regions[0].source].dtype.itemsize
        for local in tensors.values()
    )


def _lay_out(
    file: Path, checkpoint: LogicalCheckpoint, tensors: dict[str, LocalTensor], rest: dict[str, object]
) -> dict[str, StoredArray]:
    """Write a file of torch.save with room for the values; returns where each tensor's values go."""
    with FakeTensorMode():
        model = {
            name: torch.empty(local.shape, dtype=checkpoint.tensors[local.regions[0].source].dtype)
            for name, local in tensors.items()
        }
    file.parent.mkdir(parents=True)
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**rest, "checkpoint_version": 3.0, "model": model}, file)
    except RuntimeError as error:  # what torch's own writer raises when the disk is full
        raise RequestError(f"{file}: cannot be written, is the disk full? {str(error).splitlines()[0]}") from error
    return read_torch_file(file)["model"]


def _fill(
    file: Path,
    checkpoint: LogicalCheckpoint,
    tensors: dict[str, LocalTensor],
    arrays: dict[str, StoredArray],
    moved: Callable[[int], None],
) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for name, local in tensors.items():
            array = arrays[name]
            for local_region in local.regions:
                for sub in split_region(local_region.region, BUFFER_BYTES // array.dtype.itemsize):
                    inside = sub.within(local_region.region)
                    axes = len(array.shape)
                    offsets, sizes = inside.offsets[-axes:], inside.sizes[-axes:]
                    values = checkpoint.read(local_region.source, sub).reshape(sizes)
                    array.write(descriptor, values, Region((offsets[0] + local_region.row, *offsets[1:]), sizes))
                    moved(values.nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
