"""Logical hashes of a checkpoint: recorded when it was written, or computed by several processes."""

from __future__ import annotations

from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.torch_dist.logical_hash import partial_hash, tensor_hash
from flm_megatron.checkpoint.torch_dist.shard_file import BUFFER_BYTES
from flm_megatron.distributed.processes import Processes
from flm_megatron.distributed.progress import progress_bar


def recorded_hashes(source: LogicalCheckpoint, checkpoint: LogicalCheckpoint) -> dict[str, str] | None:
    """Hashes of the tensors of `checkpoint` as the manifest of `source` has them; none if it lacks any.

    `checkpoint` shows some or all of the tensors of `source`; a tensor that it changes has no recorded hash.
    """
    recorded = source.manifest.tensors
    unchanged = all(source.tensors[name] == info for name, info in checkpoint.tensors.items())
    if not unchanged or any(name not in recorded for name in checkpoint.tensors):
        return None
    return {name: recorded[name] for name in checkpoint.tensors}


def shared_hashes(checkpoint: LogicalCheckpoint, processes: Processes) -> dict[str, str]:
    """Hashes of all tensors, divided over the processes; the same on every rank."""
    chunks = [
        (name, region)
        for name, info in checkpoint.tensors.items()
        for region in split_region(Region.whole(info.shape), BUFFER_BYTES // info.dtype.itemsize)
    ]
    nbytes = sum(region.numel * checkpoint.tensors[name].dtype.itemsize for name, region in chunks)

    def own_sums() -> dict[str, int]:
        """This process's summands of the hashes."""
        sums = dict.fromkeys(checkpoint.tensors, 0)
        with progress_bar("hash", nbytes, processes) as moved:
            for name, region in chunks[processes.rank :: processes.size]:
                values = checkpoint.read(name, region)
                sums[name] += partial_hash(checkpoint.tensors[name].shape, region, values)
                moved(values.nbytes)
        return sums

    by_rank = processes.together(own_sums)
    return processes.on_first(
        lambda: {
            name: tensor_hash(info, sum(sums[name] for sums in by_rank)) for name, info in checkpoint.tensors.items()
        }
    )
