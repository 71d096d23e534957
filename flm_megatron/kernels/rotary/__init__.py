"""Rotary positions on the packed query-key-value projection of grouped queries, without a copy of any of the three."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flm_megatron.kernels.choice import implementation


def rotary_qkv(packed: Tensor, cos: Tensor, sin: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [sequence, batch x groups, queries, channels], key and value [sequence, batch x groups, 1, channels].

    `packed` [sequence, batch, groups x (queries + 2) x channels] holds for each query group its `queries` queries,
    its key and its value. Queries and keys are rotated in place, so what `packed` was is lost, and the three are
    views of it: query groups are folded into the batch, where scaled dot-product attention takes them as they lie.
    `cos` and `sin` are [sequence, channels / 2]: channel i turns with channel i + channels / 2 (Su et al., arXiv
    2104.09864, in the half-rotation form).
    """
    if not packed.is_contiguous():
        packed = packed.contiguous()
    return _RotaryQKV.apply(packed, cos, sin, queries, implementation("rotary", packed))


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, cos: Tensor, sin: Tensor, queries: int, chosen: ModuleType
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value of the operation; keeps what its gradient needs."""
        sequence, batch, width = packed.shape
        channels = 2 * cos.size(-1)
        groups = width // ((queries + 2) * channels)
        # Detached, so that the results count as new tensors; writing to it still marks `packed` as changed.
        heads = packed.detach().view(sequence, batch, groups, queries + 2, channels)
        chosen.rotate_(heads, cos, sin)
        ctx.save_for_backward(cos, sin)
        ctx.batch, ctx.chosen = batch, chosen
        folded = heads.view(sequence, batch * groups, queries + 2, channels)
        return folded[:, :, :queries], folded[:, :, queries : queries + 1], folded[:, :, queries + 1 :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients of the inputs."""
        cos, sin = ctx.saved_tensors
        unfolded = [grad.unflatten(1, (ctx.batch, -1)) for grad in grads]
        return ctx.chosen.packed_gradient(*unfolded, cos, sin).flatten(2), None, None, None, None
