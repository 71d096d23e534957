"""Products of matrices in 8-bit floating point, through `torch._scaled_mm`, with scales taken from the values.

Formats and scales are those of torchao's float8 training recipes of the same names (torchao.float8.config,
`Float8LinearRecipeName`; torchtitan uses them): `tensorwise` has one scale for a matrix, e4m3 for activations and
weights and e5m2 for gradients; `rowwise` has a scale, a power of two, for each row along which is summed, and e4m3
throughout. On a CPU torch computes the same product without any gain in speed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from flm_megatron.config.schema import StageConfig
from flm_megatron.device import current
from flm_megatron.device.chunks import FP8_SLAB_VALUES
from flm_megatron.errors import RequestError
from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import Implementation, Operation
from flm_megatron.kernels.unwritten import Gated, Normed, Operand

Scaling = Literal["tensorwise", "rowwise"]
E4M3 = torch.float8_e4m3fn
GRADIENT_DTYPE = {"tensorwise": torch.float8_e5m2, "rowwise": E4M3}
SMALLEST = 1e-30
"""Largest values below this count as this, so that zeros have a finite scale too."""


class Fp8CastKernel(Protocol):
    """What an implementation of the cast to FP8 has. Operands are [rows, columns], rounded to their own dtype before
    they are cast, whether they are written in it or not."""

    def cast(self, x: Operand, factor: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
        """`x`, or its transpose, times `factor` ([] or [rows of the result, 1], fp32), within the range of the FP8
        format `dtype`, contiguous."""

    def written(self, x: Gated | Normed) -> Tensor:
        """The values of `x`."""

    def largest(self, x: Gated | Normed, axis: int | None) -> Tensor:
        """Largest absolute value, fp32, along `axis` or of all; NaN where there is one."""


def _triton() -> Fp8CastKernel:
    from flm_megatron.kernels.fp8 import triton_kernels

    return triton_kernels


def _torch() -> Fp8CastKernel:
    from flm_megatron.kernels.fp8 import reference

    return reference


FP8_CAST: Operation[Fp8CastKernel] = Operation(
    "fp8_cast", {"triton": Implementation(_triton), "torch": Implementation(_torch)}
)


class Quantized(NamedTuple):
    """`values` x `scale`: a contiguous FP8 matrix [rows, columns] and fp32 numbers, [] or [rows, 1]."""

    values: Tensor
    scale: Tensor


def largest(x: Operand, axis: int | None = None) -> Tensor:
    """Largest absolute value of `x` [rows, columns] along `axis`, or of all values, in fp32; NaN if there is one."""
    if isinstance(x, Tensor):
        return torch.linalg.vector_norm(x, torch.inf, axis).float()
    if isinstance(x, Normed) and axis != 0:  # of each row it is known
        return x.largest.amax() if axis is None else x.largest
    return implementation(FP8_CAST, x.x).largest(x, axis)


def written(x: Operand) -> Tensor:
    """The values of `x` [rows, columns] in its own dtype."""
    return x if isinstance(x, Tensor) else implementation(FP8_CAST, x.x).written(x)


def quantize(x: Operand, dtype: torch.dtype, amax: Tensor | None = None, transpose: bool = False) -> Quantized:
    """`x` [rows, columns], or its transpose, in the FP8 format `dtype`, rounded to the nearest value.

    `amax` [] is the largest absolute value of the matrix, which gets the largest value of the format; without it every
    row (of the transpose, if that is asked for) is scaled by its own. Larger values are cut off. A NaN or infinity
    makes what is scaled with it NaN.
    """
    if amax is None:
        factor = _power_of_two(_factor(largest(x, 0 if transpose else 1), dtype)).unsqueeze(-1)
    else:
        factor = _factor(amax, dtype)
    x = x.contiguous() if isinstance(x, Tensor) else x
    stored = x if isinstance(x, Tensor) else x.x
    values = implementation(FP8_CAST, stored).cast(x, factor, dtype, transpose)
    return Quantized(values, factor.reciprocal())


def product(a: Quantized, b: Quantized, dtype: torch.dtype, fast_accumulation: bool) -> Tensor:
    """a b^T [rows of a, rows of b] in `dtype`; `a` and `b` are both scaled as a whole, or both by rows.

    With `fast_accumulation` a GPU keeps partial sums in less than fp32 (about 14 bits on Hopper) for longer.
    """
    scale_b = b.scale.t() if b.scale.ndim else b.scale
    return torch._scaled_mm(a.values, b.values.t(), a.scale, scale_b, out_dtype=dtype, use_fast_accum=fast_accumulation)


def add_product_(total: Tensor, a: Quantized, b: Quantized, dtype: torch.dtype, fast_accumulation: bool) -> None:
    """total += `product(a, b, dtype)`, in place, some rows at a time: what is added is read again out of caches, and no
    tensor of the size of `total` is made. torch's product of FP8 matrices cannot add by itself."""
    step = max(FP8_SLAB_VALUES // total.size(1) // 16, 1) * 16
    for rows in (slice(first, first + step) for first in range(0, total.size(0), step)):
        part = Quantized(a.values[rows], a.scale[rows] if a.scale.ndim else a.scale)
        total[rows].add_(product(part, b, dtype, fast_accumulation))


def require(stage: StageConfig) -> None:
    """Check that this device can run the stage's FP8 products, if it has some.

    Raises:
        RequestError: it cannot.
    """
    reason = current().fp8_obstacle() if stage.fp8 != "none" else None
    if reason:
        raise RequestError(f"stage {stage.name!r}: fp8 {stage.fp8} cannot run here: {reason}; set fp8 to none")


def describe(scaling: str, device: str) -> str:
    """One line for the log."""
    where = "torch._scaled_mm on cpu, which has no FP8 units: no speed-up" if device == "cpu" else "torch._scaled_mm"
    return f"fp8: linear layers with {scaling} scaling through {where}"


def _factor(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """What values are multiplied by: 0 for infinity, so that its reciprocal, and all that it scales, is not finite."""
    return torch.finfo(dtype).max / amax.clamp(min=SMALLEST)


def _power_of_two(factor: Tensor) -> Tensor:
    """The next power of two below; NaN for 0 and NaN."""
    mantissa, _ = torch.frexp(factor)
    return factor / (2 * mantissa)
