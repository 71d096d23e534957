"""RMSNorm, alone or with the residual addition before it, with a growth mask and a constant factor."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import Implementation, Operation
from flm_megatron.kernels.unwritten import Normed, made_of, unwritten


class Affine(NamedTuple):
    """What normalised rows are multiplied by: `weight` and growth `mask` [hidden], and a constant."""

    weight: Tensor
    mask: Tensor | None
    scale: float

    def is_plain(self) -> bool:
        """Whether it is a weight alone."""
        return self.mask is None and self.scale == 1


class RMSNorm(Protocol):
    """What an implementation of RMSNorm has: the norm and its backward pass as one function of autograd's."""

    def rms_norm(self, x: Tensor, affine: Affine, eps: float) -> Tensor:
        """As `rms_norm` below."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, affine: Affine, eps: float) -> tuple[Tensor, Tensor]:
        """As `add_rms_norm` below."""


class RMSNormKernels(Protocol):
    """Both passes over rows [rows, hidden], of which `FromKernels` makes an implementation."""

    def forward(self, x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised rows, the rows they came from (`x`, or x + residual), and 1 / rms of each row."""

    def statistics(
        self, x: Tensor, residual: Tensor | None, affine: Affine, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the largest absolute value of each normalised row, fp32, in place of the row."""

    def backward(
        self, grad: Tensor, grad_rows: Tensor | None, rows: Tensor, affine: Affine, inverse_rms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the rows and of the weight, from those of the normalised rows and of the rows themselves."""


class FromKernels:
    """RMSNorm by a forward and a backward kernel."""

    def __init__(self, kernels: RMSNormKernels) -> None:
        self._kernels = kernels

    def rms_norm(self, x: Tensor, affine: Affine, eps: float) -> Tensor:
        """As `rms_norm` below."""
        return _RMSNorm.apply(x, *affine, eps, self._kernels)

    def add_rms_norm(self, x: Tensor, residual: Tensor, affine: Affine, eps: float) -> tuple[Tensor, Tensor]:
        """As `add_rms_norm` below; the sum is written as it is normalised."""
        return _AddRMSNorm.apply(x, residual, *affine, eps, self._kernels)

    def unwritten(self, x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor]:
        """As `unwritten_rms_norm` below; the sum is written, and the rows are read once for their statistics."""
        with torch.no_grad():
            other = None if residual is None else _rows(residual)
            largest, rows, inverse_rms = self._kernels.statistics(_rows(x), other, affine, eps)
        operand = Normed(rows, inverse_rms, largest, affine.weight.detach(), affine.mask)
        result, summed = _UnwrittenRMSNorm.apply(x, residual, affine.weight, operand, affine.scale, self._kernels)
        return made_of(result, operand), x if residual is None else summed


def _apex() -> RMSNorm:
    from flm_megatron.kernels.norm import apex

    return apex


def _triton() -> RMSNorm:
    from flm_megatron.kernels.norm import triton_kernels

    return FromKernels(triton_kernels)


def _torch() -> RMSNorm:
    from flm_megatron.kernels.norm import reference

    return FromKernels(reference)


def _compile() -> RMSNorm:
    from flm_megatron.kernels.norm import compiled

    return FromKernels(compiled)


RMS_NORM: Operation[RMSNorm] = Operation(
    "rms_norm",
    {
        "apex": Implementation(_apex, plain_only=True),
        "triton": Implementation(_triton),
        "torch": Implementation(_torch),
        "compile": Implementation(_compile),
    },
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * scale over the last axis, in the dtype of `x`, computed in fp32.

    `x` is [..., hidden], `weight` and `mask` are [hidden]. With a mask m, which is 1 on old channels and v on new
    ones: x / sqrt(sum(m x^2) / sum(m) + eps) * weight * m * scale. `mask` gets no gradient.

    Raises:
        RequestError: the implementation that was asked for by name takes no mask and no factor.
    """
    affine = Affine(weight, mask, scale)
    return implementation(RMS_NORM, x, affine.is_plain()).rms_norm(x, affine, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mask: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and x + residual itself, both [..., hidden] in the dtype of `x`.

    One operation but with a library's norm that was asked for by name and knows no sum. Raises as `rms_norm`.
    """
    affine = Affine(weight, mask, scale)
    return implementation(RMS_NORM, x, plain=False).add_rms_norm(x, residual, affine, eps)


def may_leave_unwritten(x: Tensor) -> bool:
    """Whether there is an `unwritten_rms_norm` for `x`: a library's norm that was asked for by name has none."""
    return isinstance(implementation(RMS_NORM, x, plain=False), FromKernels)


def unwritten_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`, or as `rms_norm` with `x` itself where there is no residual, but the values of the norm are
    left to what reads them (`kernels.unwritten`)."""
    kernels = implementation(RMS_NORM, x, plain=False)
    assert isinstance(kernels, FromKernels), "a library writes its norms"
    return kernels.unwritten(x, residual, Affine(weight, mask, 1.0), eps)


class _Context(Context, Protocol):
    scale: float
    kernels: RMSNormKernels


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        scale: float,
        eps: float,
        kernels: RMSNormKernels,
    ) -> Tensor:
        """Value of the operation; keeps what its gradient needs."""
        out, rows, inverse_rms = kernels.forward(_rows(x), None, Affine(weight, mask, scale), eps)
        ctx.save_for_backward(rows, weight, mask, inverse_rms)
        ctx.scale, ctx.kernels = scale, kernels
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs."""
        grad_x, grad_weight = _gradients(ctx, grad, None)
        return grad_x, grad_weight, None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        scale: float,
        eps: float,
        kernels: RMSNormKernels,
    ) -> tuple[Tensor, Tensor]:
        """Value of the operation; keeps what its gradient needs."""
        out, summed, inverse_rms = kernels.forward(_rows(x), _rows(residual), Affine(weight, mask, scale), eps)
        ctx.save_for_backward(summed, weight, mask, inverse_rms)
        ctx.scale, ctx.kernels = scale, kernels
        return out.view(x.shape), summed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor, grad_summed: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs."""
        grad_x, grad_weight = _gradients(ctx, grad, grad_summed)
        return grad_x, grad_x, grad_weight, None, None, None, None


class _UnwrittenRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        operand: Normed,
        scale: float,
        kernels: RMSNormKernels,
    ) -> tuple[Tensor, Tensor | None]:
        """The norm without values, and the sum if there is a residual."""
        ctx.save_for_backward(operand.x, weight, operand.mask, operand.inverse_rms)
        ctx.scale, ctx.kernels = scale, kernels
        return unwritten(x, x.size(-1)), None if residual is None else operand.x.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor, grad_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs."""
        grad_x, grad_weight = _gradients(ctx, grad, grad_summed)
        return grad_x, grad_x if ctx.needs_input_grad[1] else None, grad_weight, None, None, None


def _gradients(ctx: _Context, grad: Tensor, grad_summed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of what was normalised, in its shape, and of the weight."""
    rows, weight, mask, inverse_rms = ctx.saved_tensors
    grad_rows = None if grad_summed is None else _rows(grad_summed)
    affine = Affine(weight, mask, ctx.scale)
    grad_x, grad_weight = ctx.kernels.backward(_rows(grad), grad_rows, rows, affine, inverse_rms)
    return grad_x.view(grad.shape), grad_weight


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1)).contiguous()
