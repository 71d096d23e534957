"""Norm and scaling of a list of gradients in one Triton launch each, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from flm_megatron.kernels.tensor_list_triton import BLOCK, addresses, spans


@triton.jit
def _squares_kernel(address_ptr: tensor, span_ptr: tensor, like: tensor, partial_ptr: tensor) -> None:
    program = tl.program_id(0)
    index = tl.load(span_ptr + program * 3)
    first, last = tl.load(span_ptr + program * 3 + 1), tl.load(span_ptr + program * 3 + 2)
    tensor_ptr = tl.load(address_ptr + index).to(like.dtype)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(tensor_ptr + at, mask=at < last, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial_ptr + program, tl.sum(total))


@triton.jit
def _scale_kernel(address_ptr: tensor, span_ptr: tensor, like: tensor, factor_ptr: tensor) -> None:
    factor = tl.load(factor_ptr)
    # Nothing is read or written when there is nothing to clip.
    if factor != 1.0:
        program = tl.program_id(0)
        index = tl.load(span_ptr + program * 3)
        first, last = tl.load(span_ptr + program * 3 + 1), tl.load(span_ptr + program * 3 + 2)
        tensor_ptr = tl.load(address_ptr + index).to(like.dtype)
        for start in range(first, last, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(tensor_ptr + at, mask=at < last, other=0.0).to(tl.float32) * factor
            tl.store(tensor_ptr + at, value.to(tensor_ptr.dtype.element_ty), mask=at < last)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """As `reference.squared_norm`: fp32 within a program, float64 over programs."""
    work = spans(tensors)
    partial = torch.empty(work.size(0), dtype=torch.float32, device=work.device)
    _squares_kernel[(work.size(0),)](addresses(tensors), work, tensors[0], partial)
    return partial.double().sum()


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """As `reference.scale_`."""
    work = spans(tensors)
    _scale_kernel[(work.size(0),)](addresses(tensors), work, tensors[0], factor)
