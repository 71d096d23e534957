"""Half-rotation rotary positions for torch.compile, on the packed output of the query-key-value projection."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.compiled import compiled


@compiled
def rotate_(packed: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.rotate_`, computed in fp32."""
    heads = packed[..., :-1, : 2 * cos.size(-1)]
    heads.copy_(_turned(heads, cos, sin))


@compiled
def packed_gradient(grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.packed_gradient`, computed in fp32."""
    return torch.cat([_back(grad_query, cos, sin), _back(grad_key, cos, sin), grad_value], dim=-2)


def _back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = 2 * cos.size(-1)
    if turned == grad.size(-1):
        return _turned(grad, cos, -sin)
    return torch.cat([_turned(grad[..., :turned], cos, -sin), grad[..., turned:]], dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [sequence, batch, groups, heads, 2 x pairs], each pair of channels turned."""
    cos, sin = (table.float()[:, None, None, None, :] for table in (cos, sin))
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
