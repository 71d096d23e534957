"""Adam's epsilon relative to the gradients, which become smaller, value by value, as models become larger.

A gradient norm of 0.2 over 1e12 parameters is 2e-7 a value. Beside that 1e-8 is not small: a weight whose gradient is
a tenth of that moves by two thirds of a step, one whose gradient is a hundredth (as of new width behind a mask that is
nearly closed) by a sixth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.config.schema import OptimizerConfig

if TYPE_CHECKING:
    from flm_megatron.engine.types import Optimizer

SMALLEST = 1e-30
"""Least epsilon, so that weights without a gradient do not become 0 / 0."""


def set_relative_epsilon(optimizer: Optimizer, options: OptimizerConfig, norm: float, parameters: int) -> None:
    """Let the next update, by whichever AdamW, use `eps_relative`; does nothing where that is not given.

    Epsilon is that times the root mean square of the clipped gradients: of so many trained `parameters` of the whole
    model, whose global norm is `norm` before clipping.
    """
    if options.eps_relative is None:
        return
    clipped = min(norm, options.clip_grad) if options.clip_grad > 0 else norm
    value = max(SMALLEST, options.eps_relative * clipped / max(1, parameters) ** 0.5)
    for group in optimizer.param_groups:
        group["eps"] = value
