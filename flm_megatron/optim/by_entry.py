"""AdamW for entries that differ in age or learning rate: those of a grown tensor, where old ones lie beside new ones.

With one step count for all, new entries, whose moments start at zero, have no bias correction: their first update is
(1 - beta1) / sqrt(1 - beta2) times the learning rate, 3.16 at beta2 = 0.999. With a step offset beside each entry, the
first update is the learning rate again.
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
MOMENTS = ("exp_avg", "exp_avg_sq")
BY_ENTRY = ("step_offset", "added")
"""What the state of a parameter may hold of each entry: Adam's step at which it was added (int32), and whether the
present stage's growth added it (bool)."""


def settling_steps(betas: tuple[float, float]) -> int:
    """Age from which both bias corrections, 1 - beta^age, round to 1 and step offsets no longer matter."""
    slowest = max(betas)
    return 1 if slowest == 0 else math.ceil(math.log(ROUNDING) / math.log(slowest))


@torch.no_grad()
def update_by_entry(
    param: Tensor, state: Mapping[str, Tensor], group: ParameterGroup, added_lr_mult: float = 1.0
) -> None:
    """One AdamW update of `param` by its gradient, in place.

    `state` has `exp_avg`, `exp_avg_sq` and any of `BY_ENTRY`, all contiguous and in the shape of `param`. `group` has
    AdamW's options and `step`, the number of this update; entries that are `added` learn at `added_lr_mult` times its
    rate. It takes some 30 bytes for each of CHUNK_VALUES values at a time.
    """
    assert param.grad is not None
    names = [*MOMENTS, *(name for name in BY_ENTRY if name in state)]
    flat = [param.view(-1), param.grad.reshape(-1), *(state[name].view(-1) for name in names)]
    for values, grad, *rest in zip(*(tensor.split(CHUNK_VALUES) for tensor in flat), strict=True):
        _update_chunk(values, grad, dict(zip(names, rest, strict=True)), group, added_lr_mult)


def _update_chunk(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], group: ParameterGroup, added_lr_mult: float
) -> None:
    beta1, beta2 = group["betas"]
    gradient, exp_avg, exp_avg_sq = grad.to(param.dtype), state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    age = group["step"] - state.get("step_offset", torch.zeros((), dtype=torch.int32, device=param.device))
    mean = exp_avg / (1 - beta1 ** age.double()).to(param.dtype)
    root = (exp_avg_sq / (1 - beta2 ** age.double()).to(param.dtype)).sqrt_().add_(group["eps"])
    rate = float(group["lr"])
    if "added" not in state:
        param.mul_(1 - rate * group["weight_decay"])
        param.addcdiv_(mean, root, value=-rate)
        return
    rates = state["added"].to(param.dtype).mul_(added_lr_mult - 1).add_(1).mul_(rate)
    param.mul_(1 - rates * group["weight_decay"])
    param.addcdiv_(mean.mul_(rates), root, value=-1)
