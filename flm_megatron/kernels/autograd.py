"""The type of what an autograd function keeps between its two passes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """`ctx` of a torch.autograd.Function, which torch leaves untyped; a function's own adds what else it keeps."""

    saved_tensors: tuple[Tensor, ...]
    """What was saved, in its order; none where none was given."""
    needs_input_grad: tuple[bool, ...]
    """Which of the inputs want a gradient."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep inputs or outputs for the backward pass."""

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Say that these outputs have no gradient."""
