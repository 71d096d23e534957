"""Adam for entries of different age: bias correction counted from the step at which each was added.

A grown tensor holds old entries beside new ones whose moments start at zero. With one step count for all, new
entries have no bias correction: their first update is (1 - beta1) / sqrt(1 - beta2) times the learning rate, 3.16
at beta2 = 0.999. With a step offset beside each entry, the first update is the learning rate again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flm_megatron.engine.types import ParameterGroup

ROUNDING = 2.0**-25
"""1 - x rounds to 1 in fp32 for x up to this."""
CHUNK_VALUES = 2**20
"""Values that are updated at a time."""


def settling_steps(betas: tuple[float, float]) -> int:
    """Age from which both bias corrections, 1 - beta^age, round to 1 and step offsets no longer matter."""
    slowest = max(betas)
    return 1 if slowest == 0 else math.ceil(math.log(ROUNDING) / math.log(slowest))


@torch.no_grad()
def update_by_age(param: Tensor, state: Mapping[str, Tensor], group: ParameterGroup) -> None:
    """One AdamW update of `param` by its gradient, in place.

    `state` has `exp_avg`, `exp_avg_sq` and `step_offset` (int32, Adam's step at which each entry was added), all
    contiguous and in the shape of `param`. `group` has AdamW's options and `step`, the number of this update. It
    takes some 30 bytes for each of CHUNK_VALUES values at a time.
    """
    assert param.grad is not None
    names = ("exp_avg", "exp_avg_sq", "step_offset")
    flat = [param.view(-1), param.grad.reshape(-1), *(state[name].view(-1) for name in names)]
    for chunks in zip(*(tensor.split(CHUNK_VALUES) for tensor in flat), strict=True):
        _update_chunk(chunks, group)


def _update_chunk(chunk: tuple[Tensor, ...], group: ParameterGroup) -> None:
    param, grad, exp_avg, exp_avg_sq, step_offset = chunk
    beta1, beta2 = group["betas"]
    gradient = grad.to(param.dtype)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    age = (group["step"] - step_offset).double()
    mean = exp_avg / (1 - beta1**age).to(param.dtype)
    root = (exp_avg_sq / (1 - beta2**age).to(param.dtype)).sqrt_()
    param.mul_(1 - group["lr"] * group["weight_decay"])
    param.addcdiv_(mean, root.add_(group["eps"]), value=-float(group["lr"]))
