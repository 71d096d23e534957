"""AdamW over lists of tensors: flat shards of a distributed optimizer, or whole parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from flm_megatron.kernels.choice import implementation
from flm_megatron.kernels.registry import ENGINE_CALLS_IT, Implementation, Operation


class TensorLists(NamedTuple):
    """What one update reads and writes: lists that go together, tensor by tensor."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]


class Hyperparameters(NamedTuple):
    """The numbers of one update; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class AdamWKernel(Protocol):
    """What an implementation of AdamW has."""

    def update_(self, lists: TensorLists, hyper: Hyperparameters, grad_factor: Tensor | None) -> None:
        """One update in place; see `adamw_`."""


def _torch() -> AdamWKernel:
    from flm_megatron.kernels.adam import reference

    return reference


def _triton() -> AdamWKernel:
    from flm_megatron.kernels.adam import triton_kernels

    return triton_kernels


# PyTorch's own update is a single kernel too, so the Triton one runs when it is asked for.
ADAMW: Operation[AdamWKernel] = Operation(
    "adamw",
    {
        "te": ENGINE_CALLS_IT,
        "apex": ENGINE_CALLS_IT,
        "torch": Implementation(_torch),
        "triton": Implementation(_triton),
    },
)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_factor: Tensor | None = None,
) -> None:
    """One update with decoupled weight decay and bias correction, in place (Loshchilov and Hutter, arXiv 1711.05101).

    The four lists go together, tensor by tensor; each list has one dtype and one device, computation is in fp32.
    `step` counts from 1. `grad_factor` (0-dim fp32 on the device) multiplies the gradients in place as they are read,
    which is clipping without a pass of its own.
    """
    if params:
        lists = TensorLists(params, grads, exp_avgs, exp_avg_sqs)
        hyper = Hyperparameters(lr, beta1, beta2, eps, weight_decay, step)
        implementation(ADAMW, params[0]).update_(lists, hyper, grad_factor)
