"""SwiGLU and GeGLU on the output of the fused gate-and-up projection."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import Implementation, Operation
from flm_megatron.kernels.unwritten import Gated, made_of, unwritten

Gate = Literal["silu", "gelu"]
"""The function of the gate; gelu is its tanh form."""


class GLUKernels(Protocol):
    """What an implementation of gated activations has; x is [rows, 2 ffn], the output [rows, ffn]."""

    def forward(self, x: Tensor, function: Gate) -> Tensor:
        """function(gate) up of x, whose first half is the gate."""

    def backward(self, grad: Tensor, x: Tensor, function: Gate) -> Tensor:
        """Gradient of x from that of the output."""


def _triton() -> GLUKernels:
    from flm_megatron.kernels.glu import triton_kernels

    return triton_kernels


def _torch() -> GLUKernels:
    from flm_megatron.kernels.glu import reference

    return reference


def _compile() -> GLUKernels:
    from flm_megatron.kernels.glu import compiled

    return compiled


SWIGLU: Operation[GLUKernels] = Operation(
    "swiglu",
    {
        "triton": Implementation(_triton),
        "torch": Implementation(_torch),
        "compile": Implementation(_compile),
    },
)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up [..., ffn] of `x` [..., 2 ffn], whose first half is the gate and whose second is up."""
    return _GLU.apply(x, "silu", implementation(SWIGLU, x), True)


def geglu(x: Tensor) -> Tensor:
    """gelu(gate) * up [..., ffn] of `x` [..., 2 ffn], with the tanh form of GELU; the implementation is SwiGLU's."""
    return _GLU.apply(x, "gelu", implementation(SWIGLU, x), True)


def unwritten_swiglu(x: Tensor) -> Tensor:
    """As `swiglu`, but its values are left to what reads them (`kernels.unwritten`)."""
    result: Tensor = _GLU.apply(x, "silu", implementation(SWIGLU, x), False)
    return made_of(result, Gated(_rows(x.detach())))


class _Context(Context, Protocol):
    function: Gate
    kernels: GLUKernels


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, function: Gate, kernels: GLUKernels, written: bool) -> Tensor:
        """Value of the operation, if it is to be `written`; keeps what its gradient needs."""
        rows = _rows(x)
        ctx.save_for_backward(rows)
        ctx.function, ctx.kernels = function, kernels
        if not written:
            return unwritten(x, x.size(-1) // 2)
        return kernels.forward(rows, function).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradients of the inputs."""
        (rows,) = ctx.saved_tensors
        grad_x = ctx.kernels.backward(grad.reshape(rows.size(0), -1).contiguous(), rows, ctx.function)
        return grad_x.view(*grad.shape[:-1], -1), None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1)).contiguous()
