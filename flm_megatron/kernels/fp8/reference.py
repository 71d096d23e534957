"""The cast to FP8 in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from flm_megatron.kernels.glu import reference as glu
from flm_megatron.kernels.norm import Affine
from flm_megatron.kernels.norm import reference as norm
from flm_megatron.kernels.unwritten import Gated, Normed, Operand


def cast(x: Operand, factor: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
    """`x` [rows, columns], or its transpose, times `factor` ([] or [rows of the result, 1], fp32), within the range of
    the FP8 format `dtype`, contiguous."""
    limit = torch.finfo(dtype).max
    values = x if isinstance(x, Tensor) else written(x)
    scaled = ((values.t() if transpose else values).float() * factor).clamp_(-limit, limit)
    return scaled.to(dtype).contiguous()


def written(x: Gated | Normed) -> Tensor:
    """The values of `x` [rows, columns], as the operation itself writes them."""
    if isinstance(x, Gated):
        return glu.forward(x.x, "silu")
    return norm.normalised(x.x, Affine(x.weight, x.mask, 1.0), x.inverse_rms)


def largest(x: Gated | Normed, axis: int | None) -> Tensor:
    """Largest absolute value, fp32, along `axis` or of all; NaN where there is one."""
    return torch.linalg.vector_norm(written(x), torch.inf, axis).float()
