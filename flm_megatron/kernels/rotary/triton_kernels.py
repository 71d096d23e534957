"""Rotary positions as Triton kernels: queries and keys rotated where they lie, gradients packed while rotated back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor


@triton.jit
def _rotate_kernel(
    packed_ptr: tensor, cos_ptr: tensor, sin_ptr: tensor,
    heads_of_position: tensor, group: tensor, half: tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
) -> None:  # fmt: skip
    # One program rotates HEADS heads of one position; `group` counts queries, key and value of a query group. The last
    # REST channels of a head stay.
    position = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    rotated = (heads < heads_of_position) & (heads % group != group - 1) & (pairs < half)
    cos = tl.load(cos_ptr + position * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    first = packed_ptr + (position * heads_of_position + heads) * (2 * half + REST) + pairs
    a = tl.load(first, mask=rotated, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=rotated, other=0.0).to(tl.float32)
    tl.store(first, (a * cos - b * sin).to(packed_ptr.dtype.element_ty), mask=rotated)
    tl.store(first + half, (b * cos + a * sin).to(packed_ptr.dtype.element_ty), mask=rotated)


@triton.jit
def _pack_kernel(
    query_ptr: tensor, key_ptr: tensor, value_ptr: tensor, cos_ptr: tensor, sin_ptr: tensor, packed_ptr: tensor,
    query_position: tensor, query_batch: tensor, query_group: tensor, query_head: tensor,
    key_position: tensor, key_batch: tensor, key_group: tensor,
    value_position: tensor, value_batch: tensor, value_group: tensor,
    batch: tensor, groups: tensor, queries: tensor, half: tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    # One program fills HEADS heads of the packed gradient of one position. Strides are in elements.
    position = tl.program_id(0).to(tl.int64)
    per_group = queries + 2
    heads_of_position = batch * groups * per_group
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    inside = (heads < heads_of_position) & (pairs < half)
    head = heads % per_group
    group = (heads // per_group) % groups
    sample = (heads // (per_group * groups)).to(tl.int64)
    is_query, is_value = head < queries, head == queries + 1
    query = query_ptr + position * query_position + sample * query_batch + group * query_group + head * query_head
    key = key_ptr + position * key_position + sample * key_batch + group * key_group
    value = value_ptr + position * value_position + sample * value_batch + group * value_group
    head_of = tl.where(is_query, query, tl.where(is_value, value, key))
    source = head_of + pairs
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    cos, sin = tl.where(is_value, 1.0, cos), tl.where(is_value, 0.0, sin)
    packed = packed_ptr + (position * heads_of_position + heads) * (2 * half + REST)
    first = packed + pairs
    tl.store(first, (a * cos + b * sin).to(packed_ptr.dtype.element_ty), mask=inside)
    tl.store(first + half, (b * cos - a * sin).to(packed_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = tl.arange(0, REST_BLOCK)[None, :]
        kept = (heads < heads_of_position) & (rest < REST)
        tl.store(packed + 2 * half + rest, tl.load(head_of + 2 * half + rest, mask=kept), mask=kept)


def rotate_(packed: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.rotate_`; `packed` is contiguous."""
    sequence, batch, groups, per_group, channels = packed.shape
    heads, block, half = batch * groups * per_group, _heads_per_program(channels), cos.size(-1)
    _rotate_kernel[(sequence, triton.cdiv(heads, block))](
        packed, cos.contiguous(), sin.contiguous(), heads, per_group, half,
        HEADS=block, HALF=triton.next_power_of_2(half), REST=channels - 2 * half,
    )  # fmt: skip


def packed_gradient(grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.packed_gradient`; gradients may have any strides but along channels."""
    sequence, batch, groups, queries, channels = grad_query.shape
    grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_query, grad_key, grad_value)]
    packed = torch.empty(
        sequence, batch, groups, queries + 2, channels, dtype=grad_query.dtype, device=grad_query.device
    )
    block, half = _heads_per_program(channels), cos.size(-1)
    rest = channels - 2 * half
    _pack_kernel[(sequence, triton.cdiv(batch * groups * (queries + 2), block))](
        *grads, cos.contiguous(), sin.contiguous(), packed,
        *grads[0].stride()[:4], *grads[1].stride()[:3], *grads[2].stride()[:3],
        batch, groups, queries, half,
        HEADS=block, HALF=triton.next_power_of_2(half), REST=rest, REST_BLOCK=triton.next_power_of_2(rest),
    )  # fmt: skip
    return packed


def _heads_per_program(channels: int) -> int:
    """Heads that make about 2,048 pairs of channels, a power of two."""
    return max(2048 // triton.next_power_of_2(channels // 2), 1)
