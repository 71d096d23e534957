"""SwiGLU on the output of the fused gate-and-up projection."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import Implementation, Operation
from flm_megatron.kernels.unwritten import Gated, made_of, unwritten


class SwiGLUKernels(Protocol):
    """What an implementation of SwiGLU has; x is [rows, 2 ffn], the output [rows, ffn]."""

    def forward(self, x: Tensor) -> Tensor:
        """silu(gate) up of x, whose first half is the gate."""

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of x from that of the output."""


def _triton() -> SwiGLUKernels:
    from flm_megatron.kernels.glu import triton_kernels

    return triton_kernels


def _torch() -> SwiGLUKernels:
    from flm_megatron.kernels.glu import reference

    return reference


def _compile() -> SwiGLUKernels:
    from flm_megatron.kernels.glu import compiled

    return compiled


SWIGLU: Operation[SwiGLUKernels] = Operation(
    "swiglu",
    {
        "triton": Implementation(_triton),
        "torch": Implementation(_torch),
        "compile": Implementation(_compile),
    },
)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up [..., ffn] of `x` [..., 2 ffn], whose first half is the gate and whose second is up."""
    return _SwiGLU.apply(x, implementation(SWIGLU, x), True)


def unwritten_swiglu(x: Tensor) -> Tensor:
    """As `swiglu`, but its values are left to what reads them (`kernels.unwritten`)."""
    result: Tensor = _SwiGLU.apply(x, implementation(SWIGLU, x), False)
    return made_of(result, Gated(_rows(x.detach())))


class _Context(Context, Protocol):
    kernels: SwiGLUKernels


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, kernels: SwiGLUKernels, written: bool) -> Tensor:
        """Value of the operation, if it is to be `written`; keeps what its gradient needs."""
        rows = _rows(x)
        ctx.save_for_backward(rows)
        ctx.kernels = kernels
        if not written:
            return unwritten(x, x.size(-1) // 2)
        return kernels.forward(rows).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradients of the inputs."""
        (rows,) = ctx.saved_tensors
        grad_x = ctx.kernels.backward(grad.reshape(rows.size(0), -1).contiguous(), rows)
        return grad_x.view(*grad.shape[:-1], -1), None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1)).contiguous()
