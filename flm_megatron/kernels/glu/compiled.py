"""SwiGLU for torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flm_megatron.kernels.compiled import compiled


@compiled
def forward(x: Tensor, mask: Tensor | None) -> Tensor:
    """As `reference.forward`, computed in fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    if mask is not None:
        gate, up = gate * mask, up * mask
    return (F.silu(gate) * up).to(x.dtype)


@compiled
def backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """As `reference.backward`, computed in fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    upstream = grad.float()
    if mask is not None:
        gate, upstream = gate * mask, upstream * mask
    sigmoid = torch.sigmoid(gate)
    grad_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    if mask is not None:
        grad_gate = grad_gate * mask
    return torch.cat([grad_gate, upstream * gate * sigmoid], dim=-1).to(x.dtype)
