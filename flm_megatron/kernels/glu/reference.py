"""SwiGLU and GeGLU in plain PyTorch, some rows at a time, so that what lies between steps stays in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.glu import Gate
from flm_megatron.kernels.row_chunks import row_chunks


def forward(x: Tensor, function: Gate) -> Tensor:
    """function(gate) up [rows, ffn] of x [rows, 2 ffn], whose first half is the gate."""
    gate, up = x.chunk(2, dim=-1)
    out = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
    for rows in row_chunks(out):
        _activate(gate[rows], function, out[rows])
        out[rows].mul_(up[rows])
    return out


def backward(grad: Tensor, x: Tensor, function: Gate) -> Tensor:
    """Gradient of x [rows, 2 ffn] from that of the output [rows, ffn]."""
    grad_x = torch.empty_like(x)
    for rows in row_chunks(grad):
        gate, up = x[rows].chunk(2, dim=-1)
        # Written into the halves of one tensor, where autograd would concatenate two.
        grad_gate, grad_up = grad_x[rows].chunk(2, dim=-1)
        torch.mul(grad[rows], up, out=grad_gate)
        if function == "gelu":
            torch.ops.aten.gelu_backward.grad_input(grad_gate, gate, approximate="tanh", grad_input=grad_gate)
        else:
            torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        _activate(gate, function, grad_up)
        grad_up.mul_(grad[rows])
    return grad_x


def _activate(gate: Tensor, function: Gate, out: Tensor) -> None:
    if function == "gelu":
        torch.ops.aten.gelu.out(gate, approximate="tanh", out=out)
    else:
        torch.ops.aten.silu.out(gate, out=out)
