"""Triton kernels that are called and not launched: for tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def without_launches() -> Iterator[None]:
    """While the block runs, `kernel[grid](...)` does nothing; what its caller allocates stays."""
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime.jit import KernelInterface

    launcher = KernelInterface.__getitem__

    def unlaunched(kernel: object, grid: object) -> Callable[..., None]:
        """In place of the launcher of a grid."""
        return _nothing

    KernelInterface.__getitem__ = unlaunched  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launcher  # type: ignore[method-assign]


def _nothing(*arguments: object, **named: object) -> None:
    """A launch of nothing."""
