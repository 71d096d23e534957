"""Grows or shrinks a checkpoint on disk, without a model, on any number of processes."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.files.destination import reserved
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.tools.reshard import stored_bytes
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.progress import progress_bar
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.record import Certificate, GrowthRecord
from flm_megatron.growth.shrink.checkpoint import ShrunkCheckpoint


def write_changed(
    checkpoint: GrownCheckpoint | ShrunkCheckpoint,
    path: Path,
    processes: Processes,
    certificate: Certificate | None = None,
) -> Manifest:
    """Write a grown or shrunk checkpoint to the new folder `path`; every process computes and writes its shard, 8 MiB
    at a time.

    Returns the manifest that was written, with the certificate beside the plan.

    Raises:
        RequestError: `path` exists or is being written, or the disk is too small.
        DamagedError: a tensor of the source cannot be read.
    """
    nbytes = stored_bytes(checkpoint.tensors)
    record = checkpoint.record.certified(certificate)
    verb = "grow" if isinstance(record, GrowthRecord) else "shrink"
    with reserved(path, processes, nbytes), progress_bar(verb, nbytes, processes) as moved:
        return copy_checkpoint(checkpoint, path, checkpoint.manifest | record.in_manifest(), progress=moved)
