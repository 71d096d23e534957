"""Accumulation of weight gradients in PyTorch's own matrix product."""

from __future__ import annotations

import torch
from torch import Tensor


def add_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """As `kernels.add_weight_gradient_`."""
    if total.dtype is rows.dtype:
        total.addmm_(grad.t(), rows)
    elif total.device.type == "cpu":
        # PyTorch's product for CPUs has one dtype; products of bf16 values are exact in fp32.
        total.addmm_(grad.t().to(total.dtype), rows.to(total.dtype))
    else:
        torch.addmm(total, grad.t(), rows, out_dtype=total.dtype, out=total)
