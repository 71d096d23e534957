"""What all ranks tell each other in a step: losses, tokens, flags and gradient norms, in one all-reduce, read once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from flm_megatron.device import current
from flm_megatron.model.forward import is_output_rank


class Told(NamedTuple):
    """Flags that any rank can pass to all others along with a step's losses."""

    stop: bool = False
    """A stop was requested."""
    save_failed: bool = False
    """The save in progress is known to have failed."""


NOTHING = Told()


class WorldSums(NamedTuple):
    """The same numbers on every rank."""

    loss: float
    """Sum of the losses of all unmasked tokens, in nats."""
    tokens: int
    """How many these are."""
    heard: Told
    """Flags that any rank has passed."""
    grad_norm: float
    """2-norm of the gradients, 0 where there are none. Replicas have the same unless one is corrupt: then the largest,
    and not a number if one is not."""
    divergence: float = 0.0
    """Sum of the divergences from a teacher of all unmasked tokens, in nats; 0 without one."""


def sum_over_world(
    outputs: Sequence[torch.Tensor],
    told: Told = NOTHING,
    squares: torch.Tensor | None = None,
    taught: bool = False,
) -> WorldSums:
    """Sum over the world what each rank has.

    `outputs` are the losses and tokens [2] float64 of micro-batches, with the divergence from the teacher [3] if they
    were `taught`, of which one tensor rank of each last pipeline rank tells its own. `squares` [replicas] float64 are
    sums of squares of gradients: each rank gives its share to the replica that it belongs to. Sums of squares are
    rounded to fp32, in which they are given, so the norm does not depend on the order in which ranks are added.
    """
    device = current().torch_device
    numbers = 3 if taught else 2
    ours = torch.zeros(numbers + len(told), dtype=torch.float64, device=device)
    if outputs and is_output_rank():
        ours[:numbers] = torch.stack(list(outputs)).sum(0)
    for index, flag in enumerate(told, numbers):
        if flag:
            ours[index].fill_(1)  # without a copy from the host, for which the device would be waited
    sums = ours if squares is None else torch.cat([ours, squares])
    dist.all_reduce(sums)
    sums[len(ours) :] = sums[len(ours) :].float()
    loss, tokens, *rest = sums.tolist()
    divergence = rest.pop(0) if taught else 0.0
    heard = Told(*(count > 0 for count in rest[: len(told)]))
    largest = max(rest[len(told) :], key=lambda square: (math.isnan(square), square), default=0.0)
    return WorldSums(loss, int(tokens), heard, largest**0.5, divergence)
