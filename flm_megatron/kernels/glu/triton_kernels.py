"""SwiGLU as Triton kernels: each value is read once and written once, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

BLOCK = 1024


@triton.jit
def _halves(x_ptr: tensor, ffn: tensor, BLOCK: tl.constexpr) -> tuple[tensor, ...]:
    """Where this program works (row, columns, which of these exist), and gate and up there."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < ffn
    start = x_ptr + row * 2 * ffn + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + ffn, mask=inside, other=0.0).to(tl.float32)
    return row, columns, inside, gate, up


@triton.jit
def _forward_kernel(
    x_ptr: tensor, out_ptr: tensor,
    units: tensor,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    ffn = units * UNIT
    row, columns, inside, gate, up = _halves(x_ptr, ffn, BLOCK)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * ffn + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr: tensor, x_ptr: tensor, grad_x_ptr: tensor,
    units: tensor,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    ffn = units * UNIT
    row, columns, inside, gate, up = _halves(x_ptr, ffn, BLOCK)
    grad = tl.load(grad_ptr + row * ffn + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad * gate * sigmoid
    start = grad_x_ptr + row * 2 * ffn + columns
    tl.store(start, grad_gate.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(start + ffn, grad_up.to(grad_x_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """As `reference.forward`, computed in fp32."""
    rows, ffn = x.size(0), x.size(1) // 2
    unit = _unit(ffn)
    out = torch.empty(rows, ffn, dtype=x.dtype, device=x.device)
    _forward_kernel[(rows, triton.cdiv(ffn, BLOCK))](x, out, ffn // unit, UNIT=unit, BLOCK=BLOCK)
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """As `reference.backward`, computed in fp32."""
    rows, ffn = grad.shape
    unit = _unit(ffn)
    grad_x = torch.empty_like(x)
    _backward_kernel[(rows, triton.cdiv(ffn, BLOCK))](grad, x, grad_x, ffn // unit, UNIT=unit, BLOCK=BLOCK)
    return grad_x


def _unit(ffn: int) -> int:
    """The largest power of two up to 16 that divides `ffn`.

    Triton sees by itself that an argument is a multiple of 16, and loads single values where it is not. A rank's part
    of 21,824 or 27,264 often is a multiple of 8 only.
    """
    return min(ffn & -ffn, 16)
