"""Gradients of weight matrices, added to their fp32 buffers by the matrix product that computes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flm_megatron.device import current as current_device
from flm_megatron.kernels import choice
from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import Implementation, Operation


class WeightGradientKernel(Protocol):
    """What an implementation of the accumulation of weight gradients has."""

    def add_(self, total: Tensor, rows: Tensor, grad: Tensor) -> None:
        """As `add_weight_gradient_`."""


def _apex() -> WeightGradientKernel:
    from flm_megatron.kernels.weight_gradient import apex

    return apex


def _torch() -> WeightGradientKernel:
    from flm_megatron.kernels.weight_gradient import reference

    return reference


# Apex builds this extension apart from its others.
WEIGHT_GRADIENT: Operation[WeightGradientKernel] = Operation(
    "weight_gradient",
    {
        "apex": Implementation(_apex, also_needs=("fused_weight_gradient_mlp_cuda",)),
        "torch": Implementation(_torch),
    },
)


def add_weight_gradient_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """total += grad^T rows, in place, products added up in the precision of `total`.

    `total` [outputs, inputs] is the buffer (fp32, or the dtype of the other two), `rows` [tokens, inputs] what a
    linear layer read and `grad` [tokens, outputs] the gradient of what it gave. Without this the product is written
    to a tensor of its own, in the precision of the weights, and added in a second pass.
    """
    implementation(WEIGHT_GRADIENT, rows).add_(total, rows, grad)


def weight_gradient_notice() -> str | None:
    """One line for the log where gradients of bf16 weights take a pass of their own, because torch is too old.

    None on a CPU, and where Apex adds them.
    """
    device = current_device().torch_device
    if device.type == "cpu" or choice.current().names[WEIGHT_GRADIENT.name] != "torch":
        return None
    from flm_megatron.kernels.weight_gradient.reference import obstacle

    reason = obstacle(device, torch.bfloat16)
    if reason is None:
        return None
    return (
        f"weight gradients take a second pass: torch.addmm of torch {torch.__version__} does not add products of bf16 "
        f"to fp32 ({reason}); that of torch 2.10 does"
    )
