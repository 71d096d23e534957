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
    if mask is None:
        mean_square = torch.linalg.vector_norm(values, dim=-1).square_() / x.size(-1)
    else:
        m = mask.to(values.dtype)
        mean_square = torch.mv(values.square(), m) / m.sum()
    inverse_rms = mean_square.add_(eps).rsqrt_()
    return _normalised(values, affine, inverse_rms, x.dtype), x, inverse_rms


def statistics(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, with the largest absolute value of each normalised row, fp32, in place of the row."""
    normed, rows, inverse_rms = forward(x, residual, affine, eps)
    return torch.linalg.vector_norm(normed, torch.inf, dim=1).float(), rows, inverse_rms


def normalised(rows: Tensor, affine: Affine, inverse_rms: Tensor) -> Tensor:
    """What `forward` gives for these rows, from 1 / rms of each."""
    return _normalised(_working(rows), affine, inverse_rms, rows.dtype)


def backward(
    grad: Tensor, grad_rows: Tensor | None, rows: Tensor, affine: Affine, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight.

    `grad` is the gradient of the normalised rows, `grad_rows` what else flows into the rows (from the residual).
    With n = sum(m), r = 1 / rms and w' = w scale the output is x r w' m, so its gradient by x is
    m (g w' r - x r^3 / n sum(g w' m x)), and by w sum over rows of g x r m scale.
    """
    weight, mask, scale = affine
    upstream, values = _working(grad), _working(rows)
    count = rows.size(-1) if mask is None else mask.to(values.dtype).sum()
    product = upstream * values
    # Matrix-vector products read the product once more and write nothing large.
    share = torch.mv(product, _gain(weight, mask, scale, values.dtype)).mul_(inverse_rms.pow(3)).div_(count)
    grad_weight = torch.mv(product.t(), inverse_rms)
    gain = _gain(weight, None, scale, values.dtype)
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


def _normalised(values: Tensor, affine: Affine, inverse_rms: Tensor, dtype: torch.dtype) -> Tensor:
    normed = torch.mul(values, inverse_rms.unsqueeze(-1)).mul_(_gain(*affine, values.dtype))
    return normed.to(dtype)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _gain(weight: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    gain = weight.to(dtype) if mask is None else weight.to(dtype) * mask
    return gain if scale == 1 else gain * scale
