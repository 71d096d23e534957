"""Cross entropy over one rank's shard of the vocabulary as Triton kernels: logits are read in their own dtype, once for
the statistics and once for the gradient, and no fp32 copy of them is ever written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

BLOCK = 4096


@triton.jit
def _statistics_kernel(
    logits_ptr: tensor, labels_ptr: tensor, found_ptr: tensor,
    rows: tensor, width: tensor, valid: tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    start = logits_ptr + row.to(tl.int64) * width
    largest, total = -float("inf"), 0.0
    for first in range(0, valid, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(start + columns, mask=columns < valid, other=-float("inf")).to(tl.float32)
        renewed = tl.maximum(largest, tl.max(values))
        total = total * tl.exp(largest - renewed) + tl.sum(tl.exp(values - renewed))
        largest = renewed
    label = tl.load(labels_ptr + row)
    here = (label >= 0) & (label < valid)
    at_label = tl.load(start + tl.where(here, label, 0), mask=here, other=0.0).to(tl.float32)
    tl.store(found_ptr + row, largest + tl.log(total))
    tl.store(found_ptr + rows + row, at_label)


@triton.jit
def _gradient_kernel(
    logits_ptr: tensor, labels_ptr: tensor, log_sum_ptr: tensor, scale_ptr: tensor, out_ptr: tensor,
    width: tensor, valid: tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits_ptr + start + columns, mask=columns < valid, other=-float("inf")).to(tl.float32)
    label = tl.load(labels_ptr + row)
    probability = tl.exp(values - tl.load(log_sum_ptr + row))
    here = (columns == label) & (columns < valid)
    grad = tl.where(here, probability - 1.0, probability) * tl.load(scale_ptr + row)
    tl.store(out_ptr + start + columns, grad.to(out_ptr.dtype.element_ty), mask=columns < width)


def statistics(logits: Tensor, labels: Tensor, valid: int) -> Tensor:
    """As `reference.statistics`, in fp32."""
    rows, width = logits.shape
    found = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    if not valid:
        found[0].fill_(-torch.inf)
        found[1].zero_()
        return found
    block = min(BLOCK, triton.next_power_of_2(valid))
    _statistics_kernel[(rows,)](logits, labels, found, rows, width, valid, BLOCK=block, num_warps=_warps(block))
    return found


def gradient(logits: Tensor, labels: Tensor, valid: int, log_sum: Tensor, scale: Tensor, out: Tensor) -> None:
    """As `reference.gradient`."""
    rows, width = logits.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    _gradient_kernel[(rows, triton.cdiv(width, block))](
        logits, labels, log_sum, scale, out, width, valid, BLOCK=block, num_warps=_warps(block)
    )


def _warps(block: int) -> int:
    """Warps of which each thread reads 16 values at a time."""
    return max(block // 512, 1)
