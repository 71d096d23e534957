"""The feed-forward layer of SwiGLU."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from flm_megatron import kernels


class GatedMLP(MLP):
    """linear_fc2(silu(gate) * up), gate and up being the two halves of linear_fc1's output."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output [sequence, batch, hidden], and linear_fc2's bias, which is not added yet."""
        assert per_token_scale is None, "there are no experts"
        fused, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(kernels.swiglu(fused if bias is None else fused + bias))
