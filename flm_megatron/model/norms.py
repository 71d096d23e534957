"""RMSNorm and LayerNorm for sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flm_megatron import kernels
from flm_megatron.device import current
from flm_megatron.engine.transformer import TransformerConfig
from flm_megatron.model.engine_config import EngineConfig


def _parameter(hidden_size: int, config: TransformerConfig, value: float) -> nn.Parameter:
    data = torch.full((hidden_size,), value, dtype=config.params_dtype, device=current().torch_device)
    parameter = nn.Parameter(data)
    # Under sequence parallelism each rank sees a shard of the sequence: the engine sums these gradients.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; computed in fp32, returned in the dtype of x."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, config, 1.0)
        self.unwritten = False
        """Whether its values are left to the linear layer that reads them, which casts them to FP8."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [sequence, batch, hidden]; with a residual, normalise their sum and return it too."""
        return self.under_mask(x, residual, None)

    def under_mask(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """The same under a growth mask [hidden], where there is one."""
        if self.unwritten and kernels.may_leave_unwritten(x):
            normed, summed = kernels.unwritten_rms_norm(x, residual, self.weight, self.eps, mask)
            return normed if residual is None else (normed, summed)
        if residual is None:
            return kernels.rms_norm(x, self.weight, self.eps, mask)
        return kernels.add_rms_norm(x, residual, self.weight, self.eps, mask)


class HeadNorm(RMSNorm):
    """RMSNorm over the channels of a head, of queries or of keys, with an epsilon of its own.

    A tensor-parallel rank has the gradient of its own heads; the engine sums it over the ranks by `qk_layernorm`.
    """

    def __init__(self, config: EngineConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, config.query_key_epsilon)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, config, 1.0)
        self.bias = _parameter(hidden_size, config, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [sequence, batch, hidden]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
