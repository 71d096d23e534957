"""The optimizer's step, with a check of the gradient norm before anything changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from flm_megatron.device import current
from flm_megatron.engine.types import Optimizer
from flm_megatron.optim.clipping import clip_at_step

Judge = Callable[[float], str | None]


@torch.no_grad()
def guarded_step(optimizer: Optimizer, judge: Judge) -> tuple[float, str | None]:
    """Clip the gradients and update the weights, unless `judge(gradient norm)` gives a reason on any rank.

    Follows the order of megatron-core's ChainedOptimizer.step, but clipping is part of the update (`clip_at_step`):
    gradients are read once for their norm and once for the update. Returns the norm before clipping, and, on every
    rank, the reason if nothing was changed.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    reason = judge(norm)
    if _any_rank(reason is not None):
        return norm, reason or "another rank measured a spike"
    for part in optimizer.chained_optimizers:
        clip_at_step(part, norm)
    optimizer.step_with_ready_grads()
    return norm, None


def _any_rank(flag: bool) -> bool:
    """Norms are equal on all ranks unless a replica is corrupt; even then all ranks must decide alike."""
    flags = torch.tensor(float(flag), device=current().torch_device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())
