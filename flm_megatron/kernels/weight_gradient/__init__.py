"""Gradients of weight matrices, added to their fp32 buffers by the matrix product that computes them."""

from __future__ import annotations

from torch import Tensor

from flm_megatron.kernels.choice import implementation


def add_weight_gradient_(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    """total += grad^T rows, in place, products added up in the precision of `total`.

    `total` [outputs, inputs] is the buffer (fp32, or the dtype of the other two), `rows` [tokens, inputs] what a
    linear layer read and `grad` [tokens, outputs] the gradient of what it gave. Without this the product is written
    to a tensor of its own, in the precision of the weights, and added in a second pass.
    """
    implementation("weight_gradient", rows).add_(total, rows, grad)
