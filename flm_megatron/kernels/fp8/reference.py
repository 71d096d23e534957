"""The cast to FP8 in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(x: Tensor, factor: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
    """x [rows, columns], or its transpose, times `factor` ([] or [rows of the result, 1], fp32), within the range of
    the FP8 format `dtype`, contiguous."""
    limit = torch.finfo(dtype).max
    scaled = ((x.t() if transpose else x).float() * factor).clamp_(-limit, limit)
    return scaled.to(dtype).contiguous()
