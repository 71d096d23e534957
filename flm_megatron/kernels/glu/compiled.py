"""SwiGLU for torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flm_megatron.kernels.compiled import compiled


@compiled
def forward(x: Tensor) -> Tensor:
    """As `reference.forward`, computed in fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


@compiled
def backward(grad: Tensor, x: Tensor) -> Tensor:
    """As `reference.backward`, computed in fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    upstream = grad.float()
    sigmoid = torch.sigmoid(gate)
    grad_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, upstream * gate * sigmoid], dim=-1).to(x.dtype)
