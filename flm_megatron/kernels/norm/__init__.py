"""RMSNorm, alone or with the residual addition before it, with a growth mask and a constant factor."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.choice import current, implementation


def rms_norm(x: Tensor, weight: Tensor, eps: float, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * scale over the last axis, in the dtype of `x`, computed in fp32.

    `x` is [..., hidden], `weight` and `mask` are [hidden]. With a mask m, which is 1 on old channels and v on new
    ones: x m / sqrt(sum((x m)^2) / sum(m) + eps) * weight * m * scale. `mask` gets no gradient.
    """
    chosen = implementation("rms_norm", x, masked=mask is not None or scale != 1)
    if hasattr(chosen, "rms_norm"):  # a library's own, with its own backward pass
        return chosen.rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, mask, eps, scale, chosen)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mask: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and x + residual itself, both [..., hidden] in the dtype of `x`.

    One operation but with a library's norm that was asked for by name and knows no sum.
    """
    plain = mask is None and scale == 1
    chosen = implementation("rms_norm", x, masked=not plain or _fuses_residual())
    if hasattr(chosen, "rms_norm"):
        summed = x + residual
        return chosen.rms_norm(summed, weight, eps), summed
    return _AddRMSNorm.apply(x, residual, weight, mask, eps, scale, chosen)


def _fuses_residual() -> bool:
    """Whether the norm of this process's choice can take the residual addition in."""
    choice = current()
    return choice.names["rms_norm"] != "apex" or "rms_norm" in choice.plain_only


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, mask: Tensor | None, eps: float, scale: float, chosen: ModuleType
    ) -> Tensor:
        """Value of the operation; keeps what its gradient needs."""
        out, rows, inverse_rms = chosen.forward(_rows(x), None, weight, mask, eps, scale)
        ctx.save_for_backward(rows, weight, mask, inverse_rms)
        ctx.scale, ctx.chosen = scale, chosen
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of the inputs."""
        rows, weight, mask, inverse_rms = ctx.saved_tensors
        grad_x, grad_weight = ctx.chosen.backward(_rows(grad), None, rows, weight, mask, inverse_rms, ctx.scale)
        return grad_x.view(grad.shape), grad_weight, None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        eps: float,
        scale: float,
        chosen: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        """Value of the operation; keeps what its gradient needs."""
        out, summed, inverse_rms = chosen.forward(_rows(x), _rows(residual), weight, mask, eps, scale)
        ctx.save_for_backward(summed, weight, mask, inverse_rms)
        ctx.scale, ctx.chosen = scale, chosen
        return out.view(x.shape), summed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_summed: Tensor) -> tuple[Any, ...]:
        """Gradients of the inputs."""
        rows, weight, mask, inverse_rms = ctx.saved_tensors
        grad_x, grad_weight = ctx.chosen.backward(
            _rows(grad), _rows(grad_summed), rows, weight, mask, inverse_rms, ctx.scale
        )
        grad_x = grad_x.view(grad.shape)
        return grad_x, grad_x, grad_weight, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1)).contiguous()
