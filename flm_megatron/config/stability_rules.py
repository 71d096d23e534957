"""Rules on what is done about steps that go wrong: each says in one line what does not fit, or gives None."""

from __future__ import annotations

from flm_megatron.config.schema import StabilityConfig


def watching_is_bounded(stability: StabilityConfig) -> str | None:
    """Counts and factors are not negative; a window has a spread."""
    least = {"sigmas": 0, "window_steps": 4, "max_in_a_row": 1, "checksum_interval_steps": 0, "z_loss": 0}
    for name, bound in least.items():
        if getattr(stability, name) < bound:
            return f"stability.{name} is {getattr(stability, name)}, give at least {bound}"
    return None


def shrink_is_a_share(stability: StabilityConfig) -> str | None:
    """The embedding's gradient is made smaller, not larger or negative."""
    factor = stability.embedding_gradient_shrink
    return None if 0 <= factor <= 1 else f"stability.embedding_gradient_shrink is {factor}, give 0 to 1"


STABILITY_RULES = (watching_is_bounded, shrink_is_a_share)
