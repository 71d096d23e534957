"""The optimizer's step in two halves: the squares of the gradients, by which is judged, and the update."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.engine.optimizer import squares_of_gradients
from flm_megatron.engine.types import Optimizer
from flm_megatron.optim.clipping import clip_at_step


@torch.no_grad()
def ready_squares(optimizer: Optimizer) -> torch.Tensor:
    """Hand the gradients to the optimizer; this rank's share of the sum of their squares [replicas] float64.

    Under the distributed optimizer all ranks share one sum. Without it each data-parallel replica has its own, over
    all gradients, and the share stands at the replica's number.
    """
    optimizer.prepare_grads()
    replicas = dist.get_world_size() // dist.get_world_size(optimizer.get_grad_stats_parallel_group())
    own = parallel_state.get_data_parallel_rank() if replicas > 1 else 0
    squares = squares_of_gradients(optimizer)
    shares = torch.zeros(replicas, dtype=torch.float64, device=squares.device)
    shares[own : own + 1] = squares
    return shares


@torch.no_grad()
def clip_and_step(optimizer: Optimizer, norm: float) -> None:
    """Clip the gradients, whose global norm is `norm`, and update the weights.

    Follows the order of megatron-core's ChainedOptimizer.step, but clipping is part of the update (`clip_at_step`):
    gradients are read once for their norm and once for the update. Copies of the state that are under way for a save
    are made first.
    """
    current().hold_changes()
    for part in optimizer.chained_optimizers:
        clip_at_step(part, norm)
    optimizer.step_with_ready_grads()
