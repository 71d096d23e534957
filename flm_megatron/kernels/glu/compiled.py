"""SwiGLU and GeGLU for torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flm_megatron.kernels.compiled import compiled
from flm_megatron.kernels.glu import Gate


@compiled
def forward(x: Tensor, function: Gate) -> Tensor:
    """As `reference.forward`, computed in fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    activated = F.gelu(gate, approximate="tanh") if function == "gelu" else F.silu(gate)
    return (activated * up).to(x.dtype)


@compiled
def backward(grad: Tensor, x: Tensor, function: Gate) -> Tensor:
    """As `reference.backward`, computed in fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    upstream = grad.float()
    if function == "gelu":
        grad_gate = torch.ops.aten.gelu_backward(upstream * up, gate, approximate="tanh")
        return torch.cat([grad_gate, upstream * F.gelu(gate, approximate="tanh")], dim=-1).to(x.dtype)
    sigmoid = torch.sigmoid(gate)
    grad_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, upstream * gate * sigmoid], dim=-1).to(x.dtype)
