"""RMSNorm as Triton kernels, which move about as few bytes as the formula needs and spill no register.

Forward every value is read once and written once: a row stays in registers. Backward a row and its gradient are read
once up to `ONE_PASS` channels, where both fit into registers beside the gradient of the weight. Wider rows are read
twice, for the sum over the row that their gradient needs and for the gradient; the second time they come from the L1
cache. Where the gradient of the weight of a whole row does not fit into the registers of a program either (more than
`COLUMNS`), several programs share a row: each computes its sum, which they read at the same time and so out of the L2
cache, and writes its own columns. Memory is read once in each case. Weight and mask are read anew for each row, from
caches: kept in registers, they would take those of the weight's gradient, of which each program leaves a partial sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from flm_megatron.device import current
from flm_megatron.kernels.norm import Affine

ONE_PASS = 8192
"""Channels up to which the backward pass reads a row once."""
COLUMNS = 10240
"""Columns whose gradient of the weight a program of the two-pass kernel keeps; half as many under a mask in fp32."""
BLOCK = 4096
"""Columns that the first of two passes takes at a time, twice as many in bf16."""


@triton.jit
def _read(ptr: tensor, start: tensor, columns: tensor, hidden: tensor) -> tensor:
    return tl.load(ptr + start + columns, mask=columns < hidden, other=0.0).to(tl.float32)


@triton.jit
def _times_mask(x: tensor, mask_ptr: tensor, columns: tensor, hidden: tensor, HAS_MASK: tl.constexpr) -> tensor:
    if HAS_MASK:
        x *= _read(mask_ptr, 0, columns, hidden)
    return x


@triton.jit
def _summed(
    x_ptr: tensor, residual_ptr: tensor, mask_ptr: tensor, sum_ptr: tensor,
    start: tensor, columns: tensor, hidden: tensor,
    HAS_RESIDUAL: tl.constexpr, HAS_MASK: tl.constexpr,
) -> tuple[tensor, ...]:  # fmt: skip
    """Values of these columns, the sum of their squares under the mask, and the sum of the mask, 0 without one."""
    x = _read(x_ptr, start, columns, hidden)
    if HAS_RESIDUAL:
        x += _read(residual_ptr, start, columns, hidden)
        # What is normalised is the sum as it is stored, so that backward sees the same numbers.
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + columns, x, mask=columns < hidden)
        x = x.to(tl.float32)
    if not HAS_MASK:
        return x, tl.sum(x * x), 0.0
    m = _read(mask_ptr, 0, columns, hidden)
    return x, tl.sum(x * x * m), tl.sum(m)


@triton.jit
def _finish(
    x: tensor, inverse_rms: tensor, weight_ptr: tensor, mask_ptr: tensor, out_ptr: tensor, x_ptr: tensor,
    start: tensor, columns: tensor, hidden: tensor, scale: tensor,
    HAS_MASK: tl.constexpr, WRITTEN: tl.constexpr,
) -> tensor:  # fmt: skip
    """Normalise these columns and write them; if they are not `WRITTEN`, only say how large they would be: the bits
    of the largest absolute value, which are in the order of the numbers, with NaN last."""
    out = x * inverse_rms * (_read(weight_ptr, 0, columns, hidden) * scale)
    out = _times_mask(out, mask_ptr, columns, hidden, HAS_MASK).to(x_ptr.dtype.element_ty)
    largest = 0
    if WRITTEN:
        tl.store(out_ptr + start + columns, out, mask=columns < hidden)
    else:
        largest = tl.max(tl.abs(out.to(tl.float32)).to(tl.int32, bitcast=True))
    return largest


@triton.jit
def _forward_kernel(
    x_ptr: tensor, residual_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor,
    out_ptr: tensor, sum_ptr: tensor, inverse_rms_ptr: tensor,
    hidden: tensor, eps: tensor, scale: tensor,
    HAS_RESIDUAL: tl.constexpr, HAS_MASK: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, WRITTEN: tl.constexpr,
) -> None:  # fmt: skip
    # Blocks are powers of two: a head and a tail waste fewer registers than one block of twice the head.
    row = tl.program_id(0).to(tl.int64)
    start = row * hidden
    head = tl.arange(0, HEAD)
    x, squares, count = _summed(x_ptr, residual_ptr, mask_ptr, sum_ptr, start, head, hidden, HAS_RESIDUAL, HAS_MASK)
    if TAIL:
        tail = HEAD + tl.arange(0, TAIL)
        x_tail, squares_tail, count_tail = _summed(
            x_ptr, residual_ptr, mask_ptr, sum_ptr, start, tail, hidden, HAS_RESIDUAL, HAS_MASK
        )
        squares += squares_tail
        count += count_tail
    if not HAS_MASK:
        count = hidden * 1.0
    inverse_rms = 1.0 / tl.sqrt(squares / count + eps)
    tl.store(inverse_rms_ptr + row, inverse_rms)
    largest = _finish(
        x, inverse_rms, weight_ptr, mask_ptr, out_ptr, x_ptr, start, head, hidden, scale, HAS_MASK, WRITTEN
    )
    if TAIL:
        largest_tail = _finish(
            x_tail, inverse_rms, weight_ptr, mask_ptr, out_ptr, x_ptr, start, tail, hidden, scale, HAS_MASK, WRITTEN
        )
        largest = tl.maximum(largest, largest_tail)
    if not WRITTEN:
        tl.store(out_ptr + row, largest)


@triton.jit
def _write_gradient(
    x: tensor, grad: tensor, share: tensor, inverse_rms: tensor,
    weight_ptr: tensor, mask_ptr: tensor, grad_rows_ptr: tensor, grad_x_ptr: tensor,
    start: tensor, columns: tensor, hidden: tensor, scale: tensor,
    HAS_ROWS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr,
) -> None:  # fmt: skip
    grad_x = (grad * (_read(weight_ptr, 0, columns, hidden) * scale) - x * share) * inverse_rms
    grad_x = _times_mask(grad_x, mask_ptr, columns, hidden, HAS_MASK)
    if HAS_ROWS_GRAD:
        grad_x += _read(grad_rows_ptr, start, columns, hidden)
    tl.store(grad_x_ptr + start + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=columns < hidden)


@triton.jit
def _write_partial(
    total: tensor, program: tensor, mask_ptr: tensor, partial_ptr: tensor,
    columns: tensor, hidden: tensor, scale: tensor,
    HAS_MASK: tl.constexpr,
) -> None:  # fmt: skip
    total = _times_mask(total * scale, mask_ptr, columns, hidden, HAS_MASK)
    tl.store(partial_ptr + program * hidden + columns, total, mask=columns < hidden)


@triton.jit
def _mask_sum(mask_ptr: tensor, hidden: tensor, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr) -> tensor:
    """Sum of the mask, or the number of channels without one."""
    count = hidden * 1.0
    if HAS_MASK:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, hidden, BLOCK):
            total += _read(mask_ptr, 0, first + tl.arange(0, BLOCK), hidden)
        count = tl.sum(total)
    return count


@triton.jit
def _backward_kernel(
    grad_ptr: tensor, grad_rows_ptr: tensor, rows_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor,
    inverse_rms_ptr: tensor, grad_x_ptr: tensor, partial_ptr: tensor,
    rows: tensor, hidden: tensor, scale: tensor,
    HAS_ROWS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    count = _mask_sum(mask_ptr, hidden, HAS_MASK, BLOCK)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for index in range(program, rows, tl.num_programs(0)):
        start = index * hidden
        inverse_rms = tl.load(inverse_rms_ptr + index)
        x = _read(rows_ptr, start, columns, hidden)
        grad = _read(grad_ptr, start, columns, hidden)
        product = grad * x
        grad_weight += product * inverse_rms
        product = _times_mask(product * _read(weight_ptr, 0, columns, hidden), mask_ptr, columns, hidden, HAS_MASK)
        share = tl.sum(product) * scale * inverse_rms * inverse_rms / count
        # Without it the compiler would keep weight and mask in registers from their first use to the second.
        tl.debug_barrier()
        _write_gradient(
            x, grad, share, inverse_rms, weight_ptr, mask_ptr, grad_rows_ptr, grad_x_ptr,
            start, columns, hidden, scale, HAS_ROWS_GRAD, HAS_MASK,
        )  # fmt: skip
    _write_partial(grad_weight, program, mask_ptr, partial_ptr, columns, hidden, scale, HAS_MASK)


@triton.jit
def _gradient_again(
    grad_weight: tensor, share: tensor, inverse_rms: tensor,
    grad_ptr: tensor, grad_rows_ptr: tensor, rows_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor,
    grad_x_ptr: tensor, start: tensor, columns: tensor, hidden: tensor, scale: tensor,
    HAS_ROWS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr,
) -> tensor:  # fmt: skip
    """Read values and gradient of these columns, write the gradient, and add to the weight's."""
    x = _read(rows_ptr, start, columns, hidden)
    grad = _read(grad_ptr, start, columns, hidden)
    grad_weight += grad * x * inverse_rms
    _write_gradient(
        x, grad, share, inverse_rms, weight_ptr, mask_ptr, grad_rows_ptr, grad_x_ptr,
        start, columns, hidden, scale, HAS_ROWS_GRAD, HAS_MASK,
    )  # fmt: skip
    return grad_weight


@triton.jit
def _two_pass_backward_kernel(
    grad_ptr: tensor, grad_rows_ptr: tensor, rows_ptr: tensor, weight_ptr: tensor, mask_ptr: tensor,
    inverse_rms_ptr: tensor, grad_x_ptr: tensor, partial_ptr: tensor,
    rows: tensor, hidden: tensor, scale: tensor,
    HAS_ROWS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
) -> None:  # fmt: skip
    # A program adds over whole rows, and writes HEAD + TAIL columns of the gradients. Those that share a row are
    # neighbours in the grid, so that they read it at the same time.
    program = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    head = tl.program_id(0) * (HEAD + TAIL) + tl.arange(0, HEAD)
    tail = tl.program_id(0) * (HEAD + TAIL) + HEAD + tl.arange(0, TAIL)
    count = _mask_sum(mask_ptr, hidden, HAS_MASK, BLOCK)
    head_weight = tl.zeros([HEAD], tl.float32)
    tail_weight = tl.zeros([TAIL], tl.float32)
    for index in range(program, rows, tl.num_programs(1)):
        start = index * hidden
        inverse_rms = tl.load(inverse_rms_ptr + index)
        products = tl.zeros([BLOCK], tl.float32)
        # Small values several blocks at a time, so that enough bytes are on their way.
        for first in range(0, hidden, BLOCKS * BLOCK):
            for block in tl.static_range(BLOCKS):
                here = first + block * BLOCK + columns
                product = _read(rows_ptr, start, here, hidden) * _read(grad_ptr, start, here, hidden)
                product *= _read(weight_ptr, 0, here, hidden)
                products += _times_mask(product, mask_ptr, here, hidden, HAS_MASK)
        share = tl.sum(products) * scale * inverse_rms * inverse_rms / count
        head_weight = _gradient_again(
            head_weight, share, inverse_rms, grad_ptr, grad_rows_ptr, rows_ptr, weight_ptr, mask_ptr, grad_x_ptr,
            start, head, hidden, scale, HAS_ROWS_GRAD, HAS_MASK,
        )  # fmt: skip
        tail_weight = _gradient_again(
            tail_weight, share, inverse_rms, grad_ptr, grad_rows_ptr, rows_ptr, weight_ptr, mask_ptr, grad_x_ptr,
            start, tail, hidden, scale, HAS_ROWS_GRAD, HAS_MASK,
        )  # fmt: skip
    _write_partial(head_weight, program, mask_ptr, partial_ptr, head, hidden, scale, HAS_MASK)
    _write_partial(tail_weight, program, mask_ptr, partial_ptr, tail, hidden, scale, HAS_MASK)


def forward(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; 1 / rms is fp32."""
    out = torch.empty_like(x)
    return out, *_forward(x, residual, affine, eps, out, written=True)


def statistics(x: Tensor, residual: Tensor | None, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.statistics`."""
    bits = torch.empty(x.size(0), dtype=torch.int32, device=x.device)
    return bits.view(torch.float32), *_forward(x, residual, affine, eps, bits, written=False)


def _forward(
    x: Tensor, residual: Tensor | None, affine: Affine, eps: float, out: Tensor, written: bool
) -> tuple[Tensor, Tensor]:
    """The rows that are normalised, and 1 / rms of each; the norm goes to `out`, or the bits of its largest values."""
    weight, mask, scale = affine
    rows, hidden = x.shape
    summed = x if residual is None else torch.empty_like(x)
    inverse_rms = torch.empty(rows, dtype=torch.float32, device=x.device)
    head = 1 << (hidden.bit_length() - 1)
    tail = triton.next_power_of_2(hidden - head) if hidden > head else 0
    # Pointers of absent operands are never read.
    _forward_kernel[(rows,)](
        x, x if residual is None else residual, weight, weight if mask is None else mask, out, summed, inverse_rms,
        hidden, eps, scale,
        HAS_RESIDUAL=residual is not None, HAS_MASK=mask is not None, HEAD=head, TAIL=tail, WRITTEN=written,
        num_warps=_warps(min(head // 16, 512)),
    )  # fmt: skip
    return summed, inverse_rms


def backward(
    grad: Tensor, grad_rows: Tensor | None, rows: Tensor, affine: Affine, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.backward`. The same number of partial sums at every call makes repeats equal to the bit."""
    weight, mask, scale = affine
    count, hidden = rows.shape
    grad_x = torch.empty_like(rows)
    block = triton.next_power_of_2(hidden)
    threads = min(max(block // 8, 32), 1024)
    head, tail = _columns_of_a_program(hidden, rows, mask)
    sharing = 1 if hidden <= ONE_PASS else triton.cdiv(hidden, head + tail)
    programs = min(count, max(current().processors() * (1024 // threads) // sharing, 1))
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=rows.device)
    operands = (
        grad, grad if grad_rows is None else grad_rows, rows, weight, weight if mask is None else mask,
        inverse_rms, grad_x, partial, count, hidden, scale, grad_rows is not None, mask is not None,
    )  # fmt: skip
    if hidden <= ONE_PASS:
        _backward_kernel[(programs,)](*operands, BLOCK=block, num_warps=_warps(threads))
    else:
        _two_pass_backward_kernel[(sharing, programs)](
            *operands, BLOCK=BLOCK, BLOCKS=4 // rows.element_size(), HEAD=head, TAIL=tail, num_warps=_warps(threads)
        )
    return grad_x, partial.sum(0).to(weight.dtype)


def _columns_of_a_program(hidden: int, rows: Tensor, mask: Tensor | None) -> tuple[int, int]:
    """Columns of one program of the two-pass kernel, as two powers of two."""
    most = COLUMNS // 2 if mask is not None and rows.element_size() == 4 else COLUMNS
    columns = triton.cdiv(hidden, triton.cdiv(hidden, most))
    head = max(triton.next_power_of_2(columns) // 2, 1)
    return head, triton.next_power_of_2(columns - head)


def _warps(threads: int) -> int:
    """Warps of so many threads; AMD's have 64."""
    return max(threads // (64 if torch.version.hip else 32), 1)
