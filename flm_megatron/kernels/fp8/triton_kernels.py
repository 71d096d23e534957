"""The cast to FP8 as a Triton kernel: a matrix is read once and written once, transposed on the way if need be."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

SIDE = 64


@triton.jit
def _cast_kernel(
    x_ptr: tensor, factor_ptr: tensor, fp8_ptr: tensor,
    rows: tensor, columns: tensor, limit: tensor,
    BY_ROW: tl.constexpr, TRANSPOSE: tl.constexpr, SIDE: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
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
    tl.store(fp8_ptr + row[:, None] * columns + column[None, :], x.to(fp8_ptr.dtype.element_ty), mask=inside)


def cast(x: Tensor, factor: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
    """As `reference.cast`."""
    rows, columns = x.shape
    out = torch.empty((columns, rows) if transpose else (rows, columns), dtype=dtype, device=x.device)
    grid = triton.cdiv(rows, SIDE), triton.cdiv(columns, SIDE)
    limit = torch.finfo(dtype).max
    _cast_kernel[grid](x, factor, out, rows, columns, limit, BY_ROW=factor.ndim > 0, TRANSPOSE=transpose, SIDE=SIDE)
    return out
