"""Reading what several ranks hold alike: each of them reads a shard of it and gets the rest from the others.

Data-parallel replicas start from the same weights. If each read all of its own, 64 replicas of a model of 2 TB would
ask the disks for 139 TB at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from flm_megatron.device import current
from flm_megatron.distributed.channels import gathered
from flm_megatron.distributed.processes import describe
from flm_megatron.errors import ERRORS, DamagedError, FlmError


@dataclass(frozen=True)
class RegionToFill:
    """The memory that a region is read into, and the call that reads its values (of the same shape)."""

    tensor: torch.Tensor
    read: Callable[[], torch.Tensor]


def fill_shared(regions: Iterator[RegionToFill], group: dist.ProcessGroup) -> None:
    """Fill `regions`, the same and in the same order on all ranks of `group`; the ranks read them in turn.

    If reading fails on any rank it fails on all, with the same kind of error and message.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    while several := list(islice(regions, size)):
        mine = _read_agreed(several[rank] if rank < len(several) else None, group)
        for owner, region in enumerate(several):
            values = mine if mine is not None and owner == rank else torch.empty_like(region.tensor).contiguous()
            dist.broadcast(values.view(-1).view(torch.uint8), dist.get_global_rank(group, owner), group)
            region.tensor.copy_(values)


def _read_agreed(region: RegionToFill | None, group: dist.ProcessGroup) -> torch.Tensor | None:
    """The values of a region as its tensor would hold them (none without one), once all ranks have read theirs."""
    values, error = None, None
    try:
        if region is not None:
            values = region.read().to(region.tensor.device, region.tensor.dtype).contiguous()
    except Exception as caught:
        error = caught
    failed = torch.tensor(error is not None, dtype=torch.int32, device=current().torch_device)
    dist.all_reduce(failed, dist.ReduceOp.MAX, group)
    if failed:
        _raise_together(error, group)
    return values


def _raise_together(error: Exception | None, group: dist.ProcessGroup) -> None:
    """Raise this rank's error, or what failed on another, of the same kind."""
    mine = None if error is None else (*describe(error), getattr(error, "checkpoint", None))
    everyone = gathered(mine, group)  # by all ranks of the group, so before any of them raises
    if error is not None:
        raise error
    kind, message, checkpoint = next(failure for failure in everyone if failure is not None)
    if kind == DamagedError.__name__:
        raise DamagedError(message, checkpoint)
    raise ERRORS.get(kind, FlmError)(message)
