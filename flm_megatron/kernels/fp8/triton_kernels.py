"""The cast to FP8 as a Triton kernel: a matrix is read once and written once, transposed on the way if need be.

The matrix may be one that is not there: a norm or an activation is then computed from its input, tile by tile, and
rounded to the dtype of its input as if it had been written.
"""

from __future__ import annotations

from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from flm_megatron.kernels.unwritten import Gated, Normed, Operand

SIDE = 64


@triton.jit
def _tile(
    x_ptr: tensor, inverse_rms_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor,
    rows: tensor, columns: tensor,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, SIDE: tl.constexpr,
) -> tuple[tensor, ...]:  # fmt: skip
    """Values of the operand in this program's tile, 0 beyond it; its rows, its columns, and which exist."""
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    width = 2 * columns if KIND == "gated" else columns
    start = x_ptr + row[:, None] * width + column[None, :]
    x = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    if KIND == "gated":
        up = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
        x = (x * tl.sigmoid(x) * up).to(x_ptr.dtype.element_ty).to(tl.float32)
    if KIND == "normed":
        inverse_rms = tl.load(inverse_rms_ptr + row, mask=row < rows, other=0.0)
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        x = x * inverse_rms[:, None] * weight[None, :]
        if HAS_MASK:
            x *= tl.load(mask_ptr + column, mask=column < columns, other=0.0)[None, :]
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x, row, column, inside


@triton.jit
def _cast_kernel(
    x_ptr: tensor, inverse_rms_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor, factor_ptr: tensor, out_ptr: tensor,
    rows: tensor, columns: tensor, limit: tensor,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, BY_ROW: tl.constexpr, TRANSPOSE: tl.constexpr, SIDE: tl.constexpr,
) -> None:  # fmt: skip
    x, row, column, inside = _tile(x_ptr, inverse_rms_ptr, weight_ptr, mask_ptr, rows, columns, KIND, HAS_MASK, SIDE)
    if TRANSPOSE:
        x, inside = tl.trans(x), tl.trans(inside)
        row, column = column, row
        columns = rows
    if BY_ROW:
        # Rows beyond the matrix are loaded from its first and not stored.
        x *= tl.load(factor_ptr + tl.where(tl.max(inside.to(tl.int32), 1) > 0, row, 0))[:, None]
    else:
        x *= tl.load(factor_ptr)
    x = tl.minimum(tl.maximum(x, -limit, tl.PropagateNan.ALL), limit, tl.PropagateNan.ALL)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _largest_kernel(
    x_ptr: tensor, inverse_rms_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor, largest_ptr: tensor,
    rows: tensor, columns: tensor,
    KIND: tl.constexpr, HAS_MASK: tl.constexpr, BY_COLUMN: tl.constexpr, SIDE: tl.constexpr,
) -> None:  # fmt: skip
    x, row, column, _ = _tile(x_ptr, inverse_rms_ptr, weight_ptr, mask_ptr, rows, columns, KIND, HAS_MASK, SIDE)
    # The bits of positive numbers are in their order, and those of a NaN come last.
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    if BY_COLUMN:
        tl.store(largest_ptr + tl.program_id(0) * columns + column, tl.max(bits, 0), mask=column < columns)
    else:
        tl.store(largest_ptr + tl.program_id(1) * rows + row, tl.max(bits, 1), mask=row < rows)


def cast(x: Operand, factor: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
    """As `reference.cast`."""
    return _cast(x, factor, dtype, transpose, torch.finfo(dtype).max)


def written(x: Gated | Normed) -> Tensor:
    """As `reference.written`."""
    return _cast(x, torch.ones((), device=x.x.device), x.x.dtype, False, inf)


def largest(x: Gated | Normed, axis: int | None) -> Tensor:
    """As `reference.largest`."""
    pointers, (rows, columns), constants = _operand(x)
    grid = triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE)
    by_column = axis == 0
    shape = (grid[0], columns) if by_column else (grid[1], rows)
    bits = torch.empty(shape, dtype=torch.int32, device=x.x.device)
    _largest_kernel[grid](*pointers, bits, rows, columns, *constants, BY_COLUMN=by_column, SIDE=SIDE)
    return (bits.amax() if axis is None else bits.amax(0)).view(torch.float32)


def _cast(x: Operand, factor: Tensor, dtype: torch.dtype, transpose: bool, limit: float) -> Tensor:
    pointers, (rows, columns), constants = _operand(x)
    out = torch.empty((columns, rows) if transpose else (rows, columns), dtype=dtype, device=factor.device)
    grid = triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE)
    by_row = factor.ndim > 0
    _cast_kernel[grid](
        *pointers, factor, out, rows, columns, limit, *constants, BY_ROW=by_row, TRANSPOSE=transpose, SIDE=SIDE
    )
    return out


def _operand(x: Operand) -> tuple[tuple[Tensor, ...], tuple[int, int], tuple[str, bool]]:
    """Input, 1 / rms, weight and mask, shape of the values, and what is computed of them, if under a mask.

    Pointers of absent operands are never read.
    """
    if isinstance(x, Tensor):
        return (x, x, x, x), (x.size(0), x.size(1)), ("matrix", False)
    rows, columns = x.x.shape
    if isinstance(x, Gated):
        return (x.x, x.x, x.x, x.x), (rows, columns // 2), ("gated", False)
    mask = x.weight if x.mask is None else x.mask
    return (x.x, x.inverse_rms, x.weight, mask), (rows, columns), ("normed", x.mask is not None)
