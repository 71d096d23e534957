"""RMSNorm of NVIDIA's Apex. Not run by this project's tests: Apex comes with NVIDIA's container image only."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., hidden] by weight [hidden] over the last axis."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, weight.shape, eps)
