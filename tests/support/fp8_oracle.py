"""FP8 formats written out in float64, and the matrix products of a linear layer with operands rounded to them."""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of the mantissa, exponent of the smallest normal number, largest value (OCP 8-bit floating point, revision 1.0).
FORMATS = {torch.float8_e4m3fn: (3, -6, 448.0), torch.float8_e5m2: (2, -14, 57344.0)}
GRADIENTS = {"tensorwise": torch.float8_e5m2, "rowwise": torch.float8_e4m3fn}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest number of the format, ties to even, cut off at the largest; float64."""
    bits, lowest, limit = FORMATS[dtype]
    x = x.double().clamp(-limit, limit)
    exponent = (torch.frexp(x)[1] - 1).clamp(min=lowest)
    step = torch.exp2((exponent - bits).double())
    return (x / step).round() * step


def dequantized(x: Tensor, dtype: torch.dtype, scaling: str) -> Tensor:
    """What is left of `x` [rows, columns]: `tensorwise` fills the range with its largest value, `rowwise` each row
    to within a factor of two."""
    largest = x.float().abs().amax() if scaling == "tensorwise" else x.float().abs().amax(1, keepdim=True)
    factor = FORMATS[dtype][2] / largest
    if scaling == "rowwise":
        factor = torch.exp2(factor.double().log2().floor()).float()
    return rounded(x.float() * factor, dtype) / factor.double()


def linear(x: Tensor, weight: Tensor, grad: Tensor, scaling: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output [tokens, outputs] and gradients of `x` [tokens, inputs] and `weight` [outputs, inputs], in float64, for
    the gradient `grad` of the output."""
    e4m3, other = torch.float8_e4m3fn, GRADIENTS[scaling]
    output = dequantized(x, e4m3, scaling) @ dequantized(weight, e4m3, scaling).t()
    grad_x = dequantized(grad, other, scaling) @ dequantized(weight.t(), e4m3, scaling).t()
    grad_weight = dequantized(grad.t(), other, scaling) @ dequantized(x.t(), e4m3, scaling).t()
    return output, grad_x, grad_weight
