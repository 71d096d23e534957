"""SwiGLU in plain PyTorch, written into halves of one tensor instead of concatenated."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, mask: Tensor | None) -> Tensor:
    """silu(gate m) (up m) [rows, ffn] of x [rows, 2 ffn], whose first half is the gate; `mask` m is [ffn]."""
    gate, up = x.chunk(2, dim=-1)
    if mask is None:
        return torch.nn.functional.silu(gate).mul_(up)
    mask = mask.to(x.dtype)
    return torch.nn.functional.silu(gate * mask).mul_(up).mul_(mask)


def backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of x [rows, 2 ffn] from that of the output [rows, ffn]."""
    gate, up = x.chunk(2, dim=-1)
    grad_x = torch.empty_like(x)
    grad_gate, grad_up = grad_x.chunk(2, dim=-1)
    if mask is not None:
        mask = mask.to(x.dtype)
        gate, grad = gate * mask, grad * mask
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    torch.ops.aten.silu.out(gate, out=grad_up)
    grad_up.mul_(grad)
    if mask is not None:
        grad_gate.mul_(mask)
    return grad_x
