"""Norm and scaling of a list of gradients in PyTorch's own multi-tensor operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all values, 0-dim float64 on their device."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().square_().sum()


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all values by `factor` (0-dim fp32 on their device) in place."""
    if factor.device.type == "cpu" and factor.item() == 1:
        return
    torch._foreach_mul_(list(tensors), factor.to(tensors[0].dtype))
