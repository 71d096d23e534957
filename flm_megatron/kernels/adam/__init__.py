"""AdamW over lists of tensors: flat shards of a distributed optimizer, or whole parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flm_megatron.kernels.choice import implementation


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
    """One update with decoupled weight decay and bias correction, in place (Loshchilov and Hutter, arXiv 1711.05101).

    The four lists go together, tensor by tensor; each list has one dtype and one device, computation is in fp32.
    `step` counts from 1. `grad_factor` (0-dim fp32 on the device) multiplies the gradients in place as they are read,
    which is clipping without a pass of its own.
    """
    if params:
        chosen = implementation("adamw", params[0])
        chosen.adamw_(
            params, grads, exp_avgs, exp_avg_sqs, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, step=step, grad_factor=grad_factor,
        )  # fmt: skip
