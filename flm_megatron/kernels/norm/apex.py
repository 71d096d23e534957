"""RMSNorm of NVIDIA's Apex. Not run by this project's tests: Apex comes with NVIDIA's container image only."""

from __future__ import annotations

from torch import Tensor

from flm_megatron.errors import RequestError
from flm_megatron.kernels.norm import Affine


def rms_norm(x: Tensor, affine: Affine, eps: float) -> Tensor:
    """RMSNorm of x [..., hidden] by a weight [hidden] over the last axis.

    Raises:
        RequestError: there is a mask or a factor.
    """
    if not affine.is_plain():
        raise RequestError("kernels.rms_norm: apex takes no mask or factor; give auto, triton or torch")
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, affine.weight, affine.weight.shape, eps)


def add_rms_norm(x: Tensor, residual: Tensor, affine: Affine, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum, which is an operation of its own."""
    summed = x + residual
    return rms_norm(summed, affine, eps), summed
