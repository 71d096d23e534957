"""RMSNorm as Triton kernels: one read and one write of the rows forward, two reads and one write backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from flm_megatron.kernels.norm import Affine

# Backward programs: each walks over many rows and leaves one partial gradient of the weight.
PARTIAL_SUMS = 256


@triton.jit
def _forward_kernel(
    x_ptr: tensor, residual_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor,
    out_ptr: tensor, sum_ptr: tensor, inverse_rms_ptr: tensor,
    hidden: tensor, eps: tensor, scale: tensor,
    HAS_RESIDUAL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    x = tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        # What is normalised is the sum as it is stored, so that backward sees the same numbers.
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * hidden + columns, x, mask=inside)
        x = x.to(tl.float32)
    gain = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) * scale
    count = hidden * 1.0
    if HAS_MASK:
        m = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x *= m
        gain *= m
        count = tl.sum(m)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(x * x) / count + eps)
    tl.store(inverse_rms_ptr + row, inverse_rms)
    out = x * inverse_rms * gain
    tl.store(out_ptr + row * hidden + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr: tensor, grad_rows_ptr: tensor, rows_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor,
    inverse_rms_ptr: tensor, grad_x_ptr: tensor, partial_ptr: tensor,
    rows: tensor, hidden: tensor, scale: tensor,
    HAS_ROWS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    gain = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) * scale
    count = hidden * 1.0
    m = inside.to(tl.float32)
    if HAS_MASK:
        m = tl.load(mask_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        gain *= m
        count = tl.sum(m)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for index in range(program, rows, tl.num_programs(0)):
        start = index * hidden
        inverse_rms = tl.load(inverse_rms_ptr + index)
        x = tl.load(rows_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_MASK:
            x *= m
        grad_weight += grad * x * inverse_rms
        grad *= gain
        share = tl.sum(grad * x) * inverse_rms * inverse_rms / count
        grad_x = (grad - x * share) * inverse_rms
        if HAS_MASK:
            grad_x *= m
        if HAS_ROWS_GRAD:
            grad_x += tl.load(grad_rows_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    grad_weight *= m * scale
    tl.store(partial_ptr + program * hidden + columns, grad_weight, mask=inside)


def forward(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; 1 / rms is fp32."""
    weight, mask, scale = affine
    rows, hidden = x.shape
    out = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    inverse_rms = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(hidden)
    # Pointers of absent operands are never read.
    _forward_kernel[(rows,)](
        x, x if residual is None else residual, weight, weight if mask is None else mask, out, summed, inverse_rms,
        hidden, eps, scale,
        HAS_RESIDUAL=residual is not None, HAS_MASK=mask is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, summed, inverse_rms


def backward(
    grad: Tensor, grad_rows: Tensor | None, rows: Tensor, affine: Affine, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.backward`. The same number of partial sums at every call makes repeats equal to the bit."""
    weight, mask, scale = affine
    count, hidden = rows.shape
    grad_x = torch.empty_like(rows)
    programs = min(PARTIAL_SUMS, count)
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(hidden)
    _backward_kernel[(programs,)](
        grad, grad if grad_rows is None else grad_rows, rows, weight, weight if mask is None else mask,
        inverse_rms, grad_x, partial,
        count, hidden, scale,
        HAS_ROWS_GRAD=grad_rows is not None, HAS_MASK=mask is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)
