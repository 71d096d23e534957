"""Triton kernels that are called and not launched: for tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch

Told = Callable[[Sequence[torch.Tensor]], None]


@contextmanager
def without_launches(told: Told | None = None) -> Iterator[None]:
    """While the block runs, `kernel[grid](...)` does nothing but to tell `told` the tensors that the kernel was called
    with; what its caller allocates stays."""
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime.jit import KernelInterface

    launcher = KernelInterface.__getitem__

    def launch(*arguments: object, **named: object) -> None:
        """A launch of nothing."""
        if told is not None:
            told([value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)])

    def unlaunched(kernel: object, grid: object) -> Callable[..., None]:
        """In place of the launcher of a grid."""
        return launch

    KernelInterface.__getitem__ = unlaunched  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launcher  # type: ignore[method-assign]
