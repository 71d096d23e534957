"""Results whose values nobody writes: what reads them computes them, in the precision that it needs them in.

A norm or an activation before a product in FP8 gives such a tensor. Autograd goes through it, and its attribute
`operand` has what its values are made of. It takes the memory of one number, a NaN, which is what a reader meets that
does not know of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gated(NamedTuple):
    """SwiGLU of x [rows, 2 ffn], whose first half is the gate."""

    x: Tensor


class Normed(NamedTuple):
    """RMSNorm of x [rows, hidden]: x / rms times weight m.

    `inverse_rms` [rows] is 1 / rms, `largest` [rows] the largest absolute value of each row of the result, both fp32;
    `weight` is [hidden], as is the growth mask m where there is one.
    """

    x: Tensor
    inverse_rms: Tensor
    largest: Tensor
    weight: Tensor
    mask: Tensor | None


Operand = Tensor | Gated | Normed
"""A matrix [rows, columns], or what one is made of."""


def unwritten(x: Tensor, columns: int) -> Tensor:
    """A result [..., columns] of an operation on `x` [..., any], in its dtype."""
    return x.new_full((), torch.nan).expand(*x.shape[:-1], columns)


def made_of(result: Tensor, operand: Operand) -> Tensor:
    """`result`, which is unwritten, with what its values are made of."""
    result.operand = operand  # type: ignore[attr-defined]
    return result


def operand_of(x: Tensor) -> Operand:
    """What the rows of x [..., columns] are made of; the rows themselves where they are written."""
    found: Operand | None = getattr(x, "operand", None)
    return x.detach().flatten(0, -2) if found is None else found
