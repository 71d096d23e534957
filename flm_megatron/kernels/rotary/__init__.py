"""Rotary positions on the packed query-key-value projection of grouped queries, without a copy of any of the three."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.autograd import Context
from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import Implementation, Operation


class RotaryKernels(Protocol):
    """What an implementation of rotary positions has.

    `cos` and `sin` are [sequence, pairs] in fp32: the first 2 x pairs channels of a head turn, the others stay.
    """

    def rotate_(self, packed: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate queries and keys of `packed` [sequence, batch, groups, queries + 2, channels] in place."""

    def packed_gradient(
        self, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Gradient of the packed projection, from those of its parts [sequence, batch, groups, heads, channels]."""


def _triton() -> RotaryKernels:
    from flm_megatron.kernels.rotary import triton_kernels

    return triton_kernels


def _torch() -> RotaryKernels:
    from flm_megatron.kernels.rotary import reference

    return reference


def _compile() -> RotaryKernels:
    from flm_megatron.kernels.rotary import compiled

    return compiled


ROTARY: Operation[RotaryKernels] = Operation(
    "rotary",
    {
        "triton": Implementation(_triton),
        "torch": Implementation(_torch),
        "compile": Implementation(_compile),
    },
)


def rotary_qkv(
    packed: Tensor, cos: Tensor, sin: Tensor, queries: int, channels: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [sequence, batch x groups, queries, channels], key and value [sequence, batch x groups, 1, channels].

    `packed` [sequence, batch, groups x (queries + 2) x channels] holds for each query group its `queries` queries,
    its key and its value. Queries and keys are rotated in place, so what `packed` was is lost, and the three are
    views of it: query groups are folded into the batch, where scaled dot-product attention takes them as they lie.
    `cos` and `sin` are [sequence, pairs]: channel i turns with channel i + pairs (Su et al., arXiv 2104.09864, in the
    half-rotation form). With more `channels` in a head than the 2 x pairs that turn the last ones stay as they are.
    """
    if not packed.is_contiguous():
        packed = packed.contiguous()
    return _RotaryQKV.apply(packed, cos, sin, queries, channels or 2 * cos.size(-1), implementation(ROTARY, packed))


class _Context(Context, Protocol):
    batch: int
    kernels: RotaryKernels


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, packed: Tensor, cos: Tensor, sin: Tensor, queries: int, channels: int, kernels: RotaryKernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value of the operation; keeps what its gradient needs."""
        sequence, batch, width = packed.shape
        groups = width // ((queries + 2) * channels)
        # Detached, so that the results count as new tensors; writing to it still marks `packed` as changed.
        heads = packed.detach().view(sequence, batch, groups, queries + 2, channels)
        kernels.rotate_(heads, cos, sin)
        ctx.save_for_backward(cos, sin)
        ctx.batch, ctx.kernels = batch, kernels
        folded = heads.view(sequence, batch * groups, queries + 2, channels)
        return folded[:, :, :queries], folded[:, :, queries : queries + 1], folded[:, :, queries + 1 :]

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Gradients of the inputs."""
        cos, sin = ctx.saved_tensors
        query, key, value = (grad.unflatten(1, (ctx.batch, -1)) for grad in grads)
        return ctx.kernels.packed_gradient(query, key, value, cos, sin).flatten(2), None, None, None, None, None
