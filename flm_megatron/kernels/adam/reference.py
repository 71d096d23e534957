"""AdamW over a list of tensors in PyTorch's own fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.adam import Hyperparameters, TensorLists


def update_(lists: TensorLists, hyper: Hyperparameters, grad_factor: Tensor | None) -> None:
    """One AdamW update in place; see `kernels.adamw_`."""
    device = lists.params[0].device
    # The kernel only reads the step, so all parameters share one; filling it on the device does not wait.
    steps = [torch.full((), float(hyper.step), dtype=torch.float32, device=device)] * len(lists.params)
    torch._fused_adamw_(
        list(lists.params), list(lists.grads), list(lists.exp_avgs), list(lists.exp_avg_sqs), [], steps,
        lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2, eps=hyper.eps, weight_decay=hyper.weight_decay,
        amsgrad=False, maximize=False,
        grad_scale=None if grad_factor is None else grad_factor.float().reciprocal(),  # what it divides gradients by
    )  # fmt: skip
