"""Copying a checkpoint for another layout or another format, and checking the copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flm_megatron.api.values import require_one_of, require_vocabulary, require_whole
from flm_megatron.checkpoint.files.destination import require_new
from flm_megatron.checkpoint.lazy.adapters import merged
from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint, dtype_named
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.megatron_legacy.reader import MegatronLegacyCheckpoint
from flm_megatron.checkpoint.megatron_legacy.writer import write_megatron_legacy
from flm_megatron.checkpoint.opening import open_with_model
from flm_megatron.checkpoint.stage_manifest import manifest_for
from flm_megatron.checkpoint.tools.hashing import recorded_hashes, shared_hashes
from flm_megatron.checkpoint.tools.reshard import require_unchanged
from flm_megatron.checkpoint.tools.reshard import reshard as copy
from flm_megatron.checkpoint.torch_dist.logical_hash import combine_hashes
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.folding import without_mask
from flm_megatron.paths import FilePath
from flm_megatron.storage.path import given_location

Hashes = dict[str, str]
"""Logical hashes by tensor."""


@dataclass(frozen=True)
class CheckpointCopy:
    """A checkpoint of ours, or of Megatron-LM's form, that was written from another one."""

    path: Path
    logical_hash: str
    """Of all its tensors; after `reshard` found to be that of the source."""


def reshard(
    checkpoint: FilePath,
    out: FilePath,
    *,
    format: Literal["torch_dist", "classic"] = "torch_dist",
    tensor: int | None = None,
    pipeline: int | None = None,
    virtual_pipeline: int = 1,
    optimizer: bool = True,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    vocab_size: int | None = None,
) -> CheckpointCopy:
    """Copy a checkpoint of any format, and compare the logical hashes of all its tensors with the source's.

    Any layout loads any copy: with `tensor` and `pipeline` each rank of that layout finds what it loads in files of
    its own. Processes that torchrun or srun started share the work and all call.

    Args:
        checkpoint: folder to read.
        out: folder to write; it must not exist.
        format: "torch_dist", or "classic" for Megatron-LM's mp_rank folders (weights only).
        tensor, pipeline: sizes of the target layout.
        virtual_pipeline: model chunks per pipeline rank.
        optimizer: whether masters and moments are copied.
        dtype: of the weights; the stored one without.
        vocab_size: true vocabulary, where the checkpoint is padded and does not record it.

    Raises:
        RequestError: the layout does not fit the model, or `out` cannot be written.
        DamagedError: the checkpoint cannot be read, or the copy has other values; then it is removed.
    """
    require_one_of("format", format, ("torch_dist", "classic"))
    require_vocabulary(vocab_size)
    weights, parallel = dtype_named(dtype), _target(format, tensor, pipeline, virtual_pipeline)
    path, out = given_location(checkpoint, "checkpoint"), given_location(out, "out")
    optimizer = optimizer and format == "torch_dist"
    require_new(out)
    with launched_processes() as processes:
        source, model = _source(path, vocab_size, format, optimizer)
        opened = ConvertedCheckpoint(source, weights, optimizer=optimizer)
        if format == "classic":
            before, after = _megatron_legacy(opened, out, (model, parallel or ParallelConfig()), processes)
        else:
            before, after = _torch_dist(opened, out, model, parallel, path, processes)
        require_unchanged(before, after, out, processes)
    return CheckpointCopy(out, combine_hashes(after))


def _source(path: Path, vocab_size: int | None, format: str, optimizer: bool) -> tuple[LogicalCheckpoint, ModelConfig]:
    """The checkpoint to copy and its model, as the format can hold them: Megatron-LM's knows no masks nor adapters."""
    source, model = open_with_model(path, vocab_size)
    if format == "classic":
        source, model = merged(without_mask(source, fold=False), model)
    if optimizer:
        source.has_optimizer()  # refuses optimizer state that has no names
    return source, model


def _target(format: str, tensor: int | None, pipeline: int | None, virtual_pipeline: int) -> ParallelConfig | None:
    """The layout to write for; none for files that are nobody's. Raises RequestError for one that cannot be."""
    for name, value in (("tensor", tensor), ("pipeline", pipeline), ("virtual_pipeline", virtual_pipeline)):
        require_whole(name, value)
    if virtual_pipeline > 1 and (pipeline or 1) < 2:
        raise RequestError(f"--virtual-pipeline {virtual_pipeline} needs a --pipeline of at least 2")
    if not (tensor or pipeline or format == "classic"):
        return None
    return ParallelConfig(tensor=tensor or 1, pipeline=pipeline or 1, virtual_pipeline=virtual_pipeline)


def _megatron_legacy(
    checkpoint: ConvertedCheckpoint, out: Path, target: tuple[ModelConfig, ParallelConfig], processes: Processes
) -> tuple[Hashes, Hashes]:
    """Write Megatron-LM's format; hashes of the source, and of what is read back."""
    sequence_length = checkpoint.manifest.run.sequence_length
    before = shared_hashes(checkpoint, processes)
    write_megatron_legacy(checkpoint, out, target, processes, sequence_length)
    return before, shared_hashes(MegatronLegacyCheckpoint(out), processes)


def _torch_dist(
    checkpoint: ConvertedCheckpoint,
    out: Path,
    model: ModelConfig,
    parallel: ParallelConfig | None,
    source: Path,
    processes: Processes,
) -> tuple[Hashes, Hashes]:
    """Write our format; hashes recorded for the source (computed where there are none), and of what was written."""
    before = recorded_hashes(checkpoint.source, checkpoint) or shared_hashes(checkpoint, processes)
    manifest = manifest_for(checkpoint, model, source)
    written = copy(checkpoint, out, processes, manifest, (model, parallel) if parallel else None)
    return before, written.tensors
