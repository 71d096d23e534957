"""SwiGLU in plain PyTorch, some rows at a time, so that what lies between its steps stays in the processor's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.row_chunks import row_chunks


def forward(x: Tensor, mask: Tensor | None) -> Tensor:
    """silu(gate m) (up m) [rows, ffn] of x [rows, 2 ffn], whose first half is the gate; `mask` m is [ffn]."""
    gate, up = x.chunk(2, dim=-1)
    mask = None if mask is None else mask.to(x.dtype)
    out = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
    for rows in row_chunks(out):
        torch.ops.aten.silu.out(_masked(gate[rows], mask), out=out[rows])
        out[rows].mul_(_masked(up[rows], mask))
    return out


def backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of x [rows, 2 ffn] from that of the output [rows, ffn]."""
    mask = None if mask is None else mask.to(x.dtype)
    grad_x = torch.empty_like(x)
    for rows in row_chunks(grad):
        gate, up = x[rows].chunk(2, dim=-1)
        # Written into the halves of one tensor, where autograd would concatenate two.
        grad_gate, grad_up = grad_x[rows].chunk(2, dim=-1)
        gate, upstream = _masked(gate, mask), _masked(grad[rows], mask)
        torch.mul(upstream, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(upstream)
        if mask is not None:
            grad_gate.mul_(mask)
    return grad_x


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
