"""The global norm of gradients, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import ENGINE_CALLS_IT, Implementation, Operation

# The engine adds the same to the norm before it divides.
NORM_FLOOR = 1e-6


class GradClipKernels(Protocol):
    """What an implementation of the gradient norm and of clipping has; the tensors of a list are contiguous and of one
    dtype and device."""

    def squared_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum of the squares of all values, 0-dim float64 on their device."""

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply all values by `factor` (0-dim fp32 on their device) in place."""


def _torch() -> GradClipKernels:
    from flm_megatron.kernels.clip import reference

    return reference


def _triton() -> GradClipKernels:
    from flm_megatron.kernels.clip import triton_kernels

    return triton_kernels


# PyTorch's own norms of lists of tensors are single kernels too, so the Triton ones run when they are asked for.
GRAD_CLIP: Operation[GradClipKernels] = Operation(
    "grad_clip",
    {
        "te": ENGINE_CALLS_IT,
        "apex": ENGINE_CALLS_IT,
        "torch": Implementation(_torch),
        "triton": Implementation(_triton),
    },
)


def grad_norm(grads: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """L2 norm of all values of `grads` over the ranks of `group`, 0-dim fp32 on their device.

    The gradients are contiguous and of one dtype and device; there is at least one.
    """
    squares = implementation(GRAD_CLIP, grads[0]).squared_norm(grads)
    if group is not None:
        dist.all_reduce(squares, group=group)
    return squares.sqrt().float()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of that norm are multiplied by: max_norm / (norm + 1e-6), at most 1; 0-dim fp32."""
    return (max_norm / (norm + NORM_FLOOR)).clamp_(max=1.0)


def scale_grads_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply `grads` by `factor` (0-dim fp32 on their device) in place; a factor of 1 costs nothing."""
    implementation(GRAD_CLIP, grads[0]).scale_(grads, factor)


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Clip `grads` in place to a global norm of `max_norm`; returns the norm before clipping, 0-dim fp32.

    The host never waits for the device. Where the optimizer multiplies gradients as it reads them, give it
    `clip_factor(grad_norm(...), max_norm)` instead and spare the pass that writes them.
    """
    norm = grad_norm(grads, group)
    scale_grads_(grads, clip_factor(norm, max_norm))
    return norm
