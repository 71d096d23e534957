"""Accumulation of weight gradients in PyTorch's own matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of a product below which it is slow.
SMALLEST_CHUNK = 64


def add_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """As `kernels.add_weight_gradient_`."""
    if total.dtype is rows.dtype:
        total.addmm_(grad.t(), rows)
    elif total.device.type != "cpu":
        torch.addmm(total, grad.t(), rows, out_dtype=total.dtype, out=total)
    else:
        # PyTorch's product for CPUs has one dtype: fp32, in which products of bf16 values are exact. What is widened
        # at a time takes half as much memory as the buffer, as the gradient itself would.
        tokens = max(total.numel() // 2 // (rows.size(1) + grad.size(1)), SMALLEST_CHUNK)
        for part, upstream in zip(rows.split(tokens), grad.split(tokens), strict=True):
            total.addmm_(upstream.t().to(total.dtype), part.to(total.dtype))
