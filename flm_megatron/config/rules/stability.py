"""Rules on what is done about steps that go wrong: each says in one line what does not fit, or gives None; one that
looks at several fields gives a line for each."""

from __future__ import annotations

from flm_megatron.config.ranges import LARGEST_COUNT, out_of_range
from flm_megatron.config.schema import StabilityConfig

LARGEST_WINDOW = 10**6


def watching_is_bounded(stability: StabilityConfig) -> list[str]:
    """Counts and factors are not negative; a window has a spread, and fits into memory."""
    negative = [
        f"stability.{name} is {getattr(stability, name)}, give at least 0"
        for name in ("sigmas", "z_loss")
        if getattr(stability, name) < 0
    ]
    counts = {
        "stability.window_steps": (stability.window_steps, 4, LARGEST_WINDOW),
        "stability.max_in_a_row": (stability.max_in_a_row, 1, LARGEST_COUNT),
        "stability.new_level_steps": (stability.new_level_steps, 0, LARGEST_COUNT),
        "stability.checksum_interval_steps": (stability.checksum_interval_steps, 0, LARGEST_COUNT),
    }
    return negative + out_of_range(counts)


def shrink_is_a_share(stability: StabilityConfig) -> str | None:
    """The embedding's gradient is made smaller, not larger or negative."""
    factor = stability.embedding_gradient_shrink
    return None if 0 <= factor <= 1 else f"stability.embedding_gradient_shrink is {factor}, give 0 to 1"


STABILITY_RULES = (watching_is_bounded, shrink_is_a_share)
