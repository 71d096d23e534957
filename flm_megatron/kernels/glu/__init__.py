"""SwiGLU on the output of the fused gate-and-up projection."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.choice import implementation


def swiglu(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """silu(gate) * up [..., ffn] of `x` [..., 2 ffn], whose first half is the gate and whose second is up.

    With a growth mask m [ffn], 1 on old units and v on new ones: silu(gate m) * (up m). `mask` gets no gradient.
    """
    return _SwiGLU.apply(x, mask, implementation("swiglu", x))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, chosen: ModuleType) -> Tensor:
        """Value of the operation; keeps what its gradient needs."""
        rows = x.reshape(-1, x.size(-1)).contiguous()
        ctx.save_for_backward(rows, mask)
        ctx.chosen = chosen
        return chosen.forward(rows, mask).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of the inputs."""
        rows, mask = ctx.saved_tensors
        grad_x = ctx.chosen.backward(grad.reshape(rows.size(0), -1).contiguous(), rows, mask)
        return grad_x.view(*grad.shape[:-1], -1), None, None
