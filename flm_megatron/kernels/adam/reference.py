"""AdamW over a list of tensors in PyTorch's own fused kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_factor: Tensor | None = None,
) -> None:
    """One AdamW update in place; see `kernels.adamw_`."""
    device = params[0].device
    # The kernel only reads the step, so all parameters share one; filling it on the device does not wait.
    steps = [torch.full((), float(step), dtype=torch.float32, device=device)] * len(params)
    torch._fused_adamw_(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], steps,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, amsgrad=False, maximize=False,
        grad_scale=None if grad_factor is None else grad_factor.float().reciprocal(),  # what it divides gradients by
    )  # fmt: skip
