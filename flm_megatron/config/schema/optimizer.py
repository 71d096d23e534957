"""The optimizer of a stage and its learning rate."""

from __future__ import annotations

from typing import Literal

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.settings import SETTINGS


@dataclass(config=SETTINGS)
class OptimizerConfig:
    """AdamW and its learning rates."""

    lr: float = 3e-4
    """Peak learning rate of embeddings, norms and biases, and of matrices unless `matrix_lr` is given."""
    matrix_lr: float | None = None
    """Peak learning rate of matrices at the base width (muP divides it by the width factor)."""
    min_lr: float = 3e-5
    """Learning rate at the end of the schedule, on the scale of `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    eps_relative: float | None = None
    """In place of `eps`: epsilon as a multiple of the root mean square of each step's clipped gradients. For models so
    large that `eps` is not small beside their gradients; 1e-3 is what 1e-8 is at about a billion parameters."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and embeddings."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(config=SETTINGS)
class ScheduleConfig:
    """Learning rate as a function of tokens."""

    kind: Literal["cosine", "linear", "wsd", "power", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up from zero; a later stage that continues the schedule has none. None means 60 steps, but
    no more than a fifth of the stage, under `boundary: rewarm`, and 0 under the others."""
    warmup_samples: int | None = None
    """The same in samples; give one of the two."""
    decay_tokens: int | None = None
    """Tokens from the start of the schedule to its end; none means the end of the stage, or of the last stage that
    continues the schedule."""
    wsd_decay_fraction: float | None = None
    """wsd: fraction of the schedule, at its end, that decays linearly; none means 0.2 where the schedule starts with
    `boundary: rewarm`, and 0.1 under the others."""
    power_exponent: float = -0.51
    """power: learning rate is proportional to tokens to this power once below the peak."""
    power_start_tokens: int | None = None
    """power: tokens at which the power law leaves the peak; none means the end of the warm-up."""
    boundary: Literal["continue", "restart", "rewarm"] = "restart"
    """At the start of a later stage: `continue` the run's schedule, `restart` it at this stage, or `rewarm`: continue,
    after a linear warm-up from zero to the continued value. `lr` and `min_lr` are always the stage's own. For staged
    runs `{kind: wsd, boundary: rewarm}` in `defaults` is recommended (docs/schedules.md)."""
