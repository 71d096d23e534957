"""Answers to megatron-core's requests for CUDA, on a machine that has none.

megatron-core names CUDA in its factory calls (`torch.zeros(..., device="cuda")`), moves tensors with `.cuda()`,
tells GPU tensors by `Tensor.type()` and asks for CUDA's generator and streams. Each of these is answered by the CPU.
The functions themselves are replaced rather than a `TorchFunctionMode` entered: a mode is off inside backward,
where recomputed layers call factories again, and it slows every other call of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch.utils._device import _device_constructors

from flm_megatron.device import cpu_collectives, cpu_streams

FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)

Arguments = ParamSpec("Arguments")


def install() -> None:
    """Put all answers in place; once in a process, before the first use of megatron-core."""
    # `with torch.device(...)` knows the factories by identity, from a table made at its first use: the originals,
    # which ours call, have to be in it.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _made_on_cpu(getattr(torch, name)))
    _answer_tensor_methods()
    _answer_cuda_module()
    cpu_collectives.install()
    cpu_streams.install()


def _names_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _made_on_cpu(factory: Callable[Arguments, torch.Tensor]) -> Callable[Arguments, torch.Tensor]:
    @wraps(factory)
    def make(*args: Arguments.args, **kwargs: Arguments.kwargs) -> torch.Tensor:
        """The factory, with a request for CUDA turned to the CPU."""
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _answer_tensor_methods() -> None:
    plain_type: Callable[..., torch.Tensor | str] = torch.Tensor.type

    def type_of(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor | str:
        """The optimizers accept parameters of the types `torch.cuda.…Tensor` only."""
        answer = plain_type(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    def stay(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """A tensor on the CPU is where it has to be."""
        return tensor

    torch.Tensor.type = type_of  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = stay  # type: ignore[method-assign, assignment]


def _answer_cuda_module() -> None:
    # One function for each name: torch's compiler keeps a table of them and refuses one under two names.
    def set_device(device: object) -> None:
        """There is only one CPU."""

    def synchronize(device: object = None) -> None:
        """No queue to wait for."""

    def empty_cache() -> None:
        """No cache to empty."""

    def get_rng_state(device: object = None) -> torch.Tensor:
        """State of the CPU's generator."""
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: object = None) -> None:
        """Set the CPU's generator."""
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        """Seed the CPU's generator."""
        torch.manual_seed(seed)

    def current_device() -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    for answer in (set_device, synchronize, empty_cache, get_rng_state, set_rng_state, manual_seed, current_device):
        setattr(torch.cuda, answer.__name__, answer)
