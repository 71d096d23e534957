"""SwiGLU and GeGLU as Triton kernels: each value is read once and written once, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from flm_megatron.kernels.glu import Gate

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
def _sigmoid(gate: tensor, GELU: tl.constexpr) -> tuple[tensor, tensor]:
    """What the gate is multiplied by, the sigmoid of something, and the slope of that.

    SiLU takes the gate's own sigmoid. 1 + tanh(y) is 2 sigmoid(2y), so the tanh form of GELU is the gate times the
    sigmoid of 2 sqrt(2 / pi) (gate + 0.044715 gate^3).
    """
    if GELU:
        square = gate * gate
        inner = 1.5957691216057308 * gate * (1.0 + 0.044715 * square)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        inner = gate
        slope = tl.full(gate.shape, 1.0, tl.float32)
    return tl.sigmoid(inner), slope


@triton.jit
def _forward_kernel(
    x_ptr: tensor, out_ptr: tensor,
    units: tensor,
    UNIT: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    ffn = units * UNIT
    row, columns, inside, gate, up = _halves(x_ptr, ffn, BLOCK)
    sigmoid, _ = _sigmoid(gate, GELU)
    out = gate * sigmoid * up
    tl.store(out_ptr + row * ffn + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr: tensor, x_ptr: tensor, grad_x_ptr: tensor,
    units: tensor,
    UNIT: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    ffn = units * UNIT
    row, columns, inside, gate, up = _halves(x_ptr, ffn, BLOCK)
    grad = tl.load(grad_ptr + row * ffn + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid, slope = _sigmoid(gate, GELU)
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid) * slope)
    grad_up = grad * gate * sigmoid
    start = grad_x_ptr + row * 2 * ffn + columns
    tl.store(start, grad_gate.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(start + ffn, grad_up.to(grad_x_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, function: Gate) -> Tensor:
    """As `reference.forward`, computed in fp32."""
    rows, ffn = x.size(0), x.size(1) // 2
    unit = _unit(ffn)
    out = torch.empty(rows, ffn, dtype=x.dtype, device=x.device)
    _forward_kernel[(rows, triton.cdiv(ffn, BLOCK))](
        x, out, ffn // unit, UNIT=unit, GELU=function == "gelu", BLOCK=BLOCK
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, function: Gate) -> Tensor:
    """As `reference.backward`, computed in fp32."""
    rows, ffn = grad.shape
    unit = _unit(ffn)
    grad_x = torch.empty_like(x)
    _backward_kernel[(rows, triton.cdiv(ffn, BLOCK))](
        grad, x, grad_x, ffn // unit, UNIT=unit, GELU=function == "gelu", BLOCK=BLOCK
    )  # fmt: skip
    return grad_x


def _unit(ffn: int) -> int:
    """The largest power of two up to 16 that divides `ffn`.

    Triton sees by itself that an argument is a multiple of 16, and loads single values where it is not. A rank's part
    of 21,824 or 27,264 often is a multiple of 8 only.
    """
    return min(ffn & -ffn, 16)
