"""Half-rotation rotary positions in plain PyTorch, on the packed output of the query-key-value projection."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_(packed: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys of `packed` [sequence, batch, groups, queries + 2, channels] in place.

    The last two heads of a group are its key and its value. `cos` and `sin` are [sequence, pairs] in fp32, of the first
    2 x pairs channels.
    """
    cos, sin, turned = _over_heads(cos, packed), _over_heads(sin, packed), 2 * cos.size(-1)
    # One head of every group at a time: a loop over few heads inside one over groups would be slow on a CPU.
    for head in packed[..., :-1, :turned].unbind(-2):
        first, second = head.chunk(2, dim=-1)
        a, b = first.to(cos.dtype), second.to(cos.dtype)
        rotated = torch.mul(a, cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).addcmul_(a, sin)
        if b is not second:
            second.copy_(b)
        first.copy_(rotated)


def packed_gradient(grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of the packed projection [sequence, batch, groups, queries + 2, channels].

    `grad_query` is [sequence, batch, groups, queries, channels], the other two have one head in place of queries.
    """
    queries = grad_query.size(-2)
    shape = (*grad_query.shape[:-2], queries + 2, grad_query.size(-1))
    packed = torch.empty(shape, dtype=grad_query.dtype, device=grad_query.device)
    cos, sin = _over_heads(cos, packed), _over_heads(sin, packed)
    rotated = (*grad_query.unbind(-2), grad_key.squeeze(-2))
    for grad, out in zip(rotated, packed.unbind(-2), strict=False):
        _rotate_back(grad, cos, sin, out)
    packed[..., queries + 1 :, :] = grad_value
    return packed


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    turned = 2 * cos.size(-1)
    if turned < out.size(-1):
        out[..., turned:] = grad[..., turned:]
    a, b = (half.to(cos.dtype) for half in grad[..., :turned].chunk(2, dim=-1))
    first, second = out[..., :turned].chunk(2, dim=-1)
    if out.dtype is not cos.dtype:
        first.copy_(torch.mul(a, cos).addcmul_(b, sin))
        second.copy_(torch.mul(b, cos).addcmul_(a, sin, value=-1))
        return
    torch.mul(a, cos, out=first).addcmul_(b, sin)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=-1)


def _over_heads(table: Tensor, packed: Tensor) -> Tensor:
    working = torch.float64 if packed.dtype is torch.float64 else torch.float32
    return table.to(working)[:, None, None, :]
