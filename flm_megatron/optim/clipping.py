"""Gradient norms and clipping by our kernels, where megatron-core looks for Transformer Engine's or Apex's.

Without either it falls back to one norm per parameter, and the host waits for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flm_megatron import kernels
from flm_megatron.engine import optimizer as engine
from flm_megatron.engine.types import ChainedPart
from flm_megatron.optim.adamw import AdamW


def install_clipping() -> bool:
    """Install our kernels unless the choice of kernels is `te` or `apex`; returns whether they are installed."""
    if kernels.current().engine_calls("grad_clip"):
        return False
    engine.install_clipping(_apply, _l2_norm, _scale)
    return True


def clip_at_step(optimizer: ChainedPart, norm: float) -> None:
    """Clip the gradients of one of megatron-core's optimizers to its `clip_grad`; `norm` is their global norm.

    Our AdamW multiplies them as it reads them for its update; other optimizers in a pass of its own now. Does nothing
    if the norm is small enough.
    """
    if getattr(optimizer, "is_stub_optimizer", False) or optimizer.config.clip_grad <= 0:
        return
    largest = optimizer.config.clip_grad
    if not isinstance(optimizer.optimizer, AdamW):
        engine.clip_grads_by_norm(optimizer, norm)
    elif norm + kernels.NORM_FLOOR > largest:
        optimizer.optimizer.clip(largest / (norm + kernels.NORM_FLOOR))


def _apply(operation: Callable[..., object], overflow: Tensor, lists: list[list[Tensor]], *arguments: object) -> object:
    return operation(overflow, lists, *arguments)


def _l2_norm(overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Norm [1] in fp32 of the first list."""
    assert not per_tensor
    return kernels.grad_norm(lists[0]).reshape(1), None


def _scale(overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Multiply the first list in place; the second names where the results go, which is the same."""
    if lists[0]:
        kernels.scale_grads_(lists[0], torch.full((), factor, dtype=torch.float32, device=lists[0][0].device))
