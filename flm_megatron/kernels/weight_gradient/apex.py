"""Accumulation of weight gradients in NVIDIA's Apex. Not run by this project's tests, like all that is Apex's."""

from __future__ import annotations

import torch
from torch import Tensor


def add_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """As `kernels.add_weight_gradient_`; the extension takes matrices of 16 or 32 bits."""
    import fused_weight_gradient_mlp_cuda as extension

    wide = total.dtype is torch.float32
    add = extension.wgrad_gemm_accum_fp32 if wide else extension.wgrad_gemm_accum_fp16
    add(rows, grad, total)
