"""Accumulation of weight gradients in PyTorch's own matrix product."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flm_megatron.errors import reason
from flm_megatron.kernels.choice import current

# Tokens of a product below which it is slow.
SMALLEST_CHUNK = 64
# Matrices of the probe: large enough for every alignment that a library asks for.
PROBED = 16


def add_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """As `kernels.add_weight_gradient_`."""
    if total.dtype is rows.dtype:
        total.addmm_(grad.t(), rows)
    elif current().device == "rehearsed":  # which stands for a GPU of any kind
        torch.addmm(total, grad.t(), rows, out_dtype=total.dtype, out=total)
    elif total.device.type == "cpu":
        # PyTorch's product for CPUs has one dtype: fp32, in which products of bf16 values are exact. What is widened
        # at a time takes half as much memory as the buffer, as the gradient itself would.
        tokens = max(total.numel() // 2 // (rows.size(1) + grad.size(1)), SMALLEST_CHUNK)
        for part, upstream in zip(rows.split(tokens), grad.split(tokens), strict=True):
            total.addmm_(upstream.t().to(total.dtype), part.to(total.dtype))
    elif obstacle(total.device, rows.dtype) is None:
        torch.addmm(total, grad.t(), rows, out_dtype=total.dtype, out=total)
    else:
        total.add_(grad.t() @ rows)


@cache
def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's product of matrices of `dtype` cannot add to an fp32 matrix on `device`; none if it can.

    Tried once per process, on small numbers that fp32 holds exactly and bf16 does not: early versions of torch have no
    such argument, later ones refuse a sum in fp32.
    """
    total = torch.full((PROBED, PROBED), 1000.25, dtype=torch.float32, device=device)
    rows = torch.arange(PROBED, dtype=dtype, device=device).expand(PROBED, -1).contiguous()
    ones = torch.ones(PROBED, PROBED, dtype=dtype, device=device)
    expected = total + PROBED * rows.float()
    try:
        torch.addmm(total, ones.t(), rows, out_dtype=total.dtype, out=total)
    except (TypeError, RuntimeError) as error:
        return reason(error)
    return None if torch.equal(total, expected) else "it gives wrong values"
