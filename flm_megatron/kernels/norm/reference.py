"""RMSNorm in plain PyTorch, in as few passes over memory as its operations allow."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.norm import Affine


def forward(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, the rows they came from (`x`, or x + residual), and 1 / rms of each row.

    `x` and `residual` are [rows, hidden]. 1 / rms is fp32, or float64 for float64 rows.
    """
    mask = affine.mask
    if residual is not None:
        x = x + residual
    values = _working(x)
    masked = values if mask is None else values * mask
    count = x.size(-1) if mask is None else mask.to(values.dtype).sum()
    mean_square = torch.linalg.vector_norm(masked, dim=-1).square_() / count
    inverse_rms = mean_square.add_(eps).rsqrt_()
    return _normalised(masked, affine, inverse_rms, x.dtype), x, inverse_rms


def statistics(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, with the largest absolute value of each normalised row, fp32, in place of the row."""
    normed, rows, inverse_rms = forward(x, residual, affine, eps)
    return torch.linalg.vector_norm(normed, torch.inf, dim=1).float(), rows, inverse_rms


def normalised(rows: Tensor, affine: Affine, inverse_rms: Tensor) -> Tensor:
    """What `forward` gives for these rows, from 1 / rms of each."""
    values = _working(rows)
    return _normalised(values if affine.mask is None else values * affine.mask, affine, inverse_rms, rows.dtype)


def backward(
    grad: Tensor, grad_rows: Tensor | None, rows: Tensor, affine: Affine, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight.

    `grad` is the gradient of the normalised rows, `grad_rows` what else flows into the rows (from the residual).
    With u = x m, n = sum(m), r = 1 / rms and w' = w m scale the output is u r w', so its gradient by x is
    m (g w' r - u r^3 / n sum(g w' u)), and by w sum over rows of g u r m scale.
    """
    weight, mask, scale = affine
    upstream, values = _working(grad), _working(rows)
    count: Tensor | float = rows.size(-1)
    if mask is not None:
        values, count = values * mask, mask.to(values.dtype).sum()
    gain = _gain(weight, mask, scale, values.dtype)
    product = upstream * values
    # Matrix-vector products read the product once more and write nothing large.
    share = torch.mv(product, gain).mul_(inverse_rms.pow(3)).div_(count)
    grad_weight = torch.mv(product.t(), inverse_rms)
    grad_x = torch.mul(upstream, gain, out=product).mul_(inverse_rms.unsqueeze(-1))
    grad_x.addcmul_(values, share.unsqueeze(-1), value=-1)
    if mask is not None:
        grad_weight.mul_(mask)
        grad_x.mul_(mask)
    if scale != 1:
        grad_weight.mul_(scale)
    if grad_rows is not None:
        grad_x.add_(grad_rows)
    return grad_x.to(rows.dtype), grad_weight.to(weight.dtype)


def _normalised(masked: Tensor, affine: Affine, inverse_rms: Tensor, dtype: torch.dtype) -> Tensor:
    normed = torch.mul(masked, inverse_rms.unsqueeze(-1)).mul_(_gain(*affine, masked.dtype))
    return normed.to(dtype)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _gain(weight: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    gain = weight.to(dtype) if mask is None else weight.to(dtype) * mask
    return gain if scale == 1 else gain * scale
