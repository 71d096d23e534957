"""Many tensors in one kernel launch: a table of their addresses, and of which program works on which part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

# Values that one program works on, block by block.
SPAN = 1 << 15
BLOCK = tl.constexpr(1024)


def addresses(*lists: Sequence[Tensor]) -> Tensor:
    """Addresses of the tensors of all lists [lists, tensors] int64, on their device.

    Tensors are contiguous, those of a list of one dtype.
    """
    assert all(tensor.is_contiguous() for tensors in lists for tensor in tensors)
    assert all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists)
    table = torch.tensor([[tensor.data_ptr() for tensor in tensors] for tensors in lists], dtype=torch.int64)
    return table.to(lists[0][0].device, non_blocking=True)


def spans(tensors: Sequence[Tensor]) -> Tensor:
    """Work of each program [programs, 3] int64: index of the tensor, its first value there, and one past its last."""
    return _spans(tuple(tensor.numel() for tensor in tensors), tensors[0].device)


@lru_cache(maxsize=64)
def _spans(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    parts = []
    for index, size in enumerate(sizes):
        first = torch.arange(0, size, SPAN)
        parts.append(torch.stack([torch.full_like(first, index), first, (first + SPAN).clamp(max=size)], dim=1))
    return torch.cat(parts).to(device)
