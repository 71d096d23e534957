"""RMSNorm for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.compiled import compiled
from flm_megatron.kernels.norm import Affine


@compiled
def forward(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`, computed in fp32."""
    weight, mask, scale = affine
    rows = x if residual is None else x + residual
    values = rows.float()
    squares = values.square() if mask is None else values.square() * mask
    count = x.size(-1) if mask is None else mask.sum()
    inverse_rms = torch.rsqrt(squares.sum(-1) / count + eps)
    gain = weight.float() * scale if mask is None else weight.float() * mask * scale
    normed = values * inverse_rms.unsqueeze(-1) * gain
    return normed.to(x.dtype), rows, inverse_rms


@compiled
def statistics(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.statistics`, computed in fp32."""
    normed, rows, inverse_rms = forward(x, residual, affine, eps)
    return normed.abs().amax(1).float(), rows, inverse_rms


@compiled
def backward(
    grad: Tensor, grad_rows: Tensor | None, rows: Tensor, affine: Affine, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.backward`, computed in fp32."""
    weight, mask, scale = affine
    upstream, values = grad.float(), rows.float()
    gain = weight.float() * scale
    count = rows.size(-1) if mask is None else mask.sum()
    masked = gain if mask is None else gain * mask
    rms = inverse_rms.unsqueeze(-1)
    share = (upstream * masked * values).sum(-1, keepdim=True) * rms.pow(3) / count
    grad_x = upstream * gain * rms - values * share
    grad_weight = (upstream * values * rms).sum(0) * scale
    if mask is not None:
        grad_x, grad_weight = grad_x * mask, grad_weight * mask
    if grad_rows is not None:
        grad_x = grad_x + grad_rows
    return grad_x.to(rows.dtype), grad_weight.to(weight.dtype)
