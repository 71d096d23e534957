"""What growth can save at most, by equality of losses.

A small model that has trained D_s tokens has a loss; a larger one from scratch has the same loss after D_0 tokens. A
growth that lost nothing would let the grown model go on as if it had trained D_0 tokens itself; of those it keeps a
share (1 in this bound, what the operator was measured to keep otherwise). With costs per token c_s and c_l, and D the
tokens from scratch to the loss that is aimed at, the run costs D_s c_s + (D - kept D_0) c_l in place of D c_l, so it
saves (kept D_0 - D_s c_s / c_l) / D. Where kept is 1 this is largest where the small model's loss falls as much for a
FLOP as the large one's does at the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flm_megatron.planner.loss_law import LossLaw

GRID = 4000
NOTHING = 1e-9
"""Share saved that is rounding."""
LEAST_LARGE = 0.25
"""Share of the tokens from scratch that the large stage trains at least, for its re-warm-up and the decay."""


@dataclass(frozen=True)
class Pair:
    """The laws of the small and of the large model under one reading of the data."""

    small: LossLaw
    large: LossLaw

    def equal_tokens(self, small_tokens: np.ndarray) -> np.ndarray:
        """Tokens of the large model from scratch to the small one's loss after `small_tokens`."""
        return self.large.tokens(self.small.loss(small_tokens))


@dataclass(frozen=True)
class Kept:
    """The share of D_0 that a growth keeps: expected, least and most."""

    expected: float = 1.0
    low: float = 1.0
    high: float = 1.0


@dataclass(frozen=True)
class GrowthPoint:
    """When to grow, and what that saves of the cost from scratch: the mean over pairs of laws, the least, the most.

    `needed` is the share of D_0 that a growth has to keep to save anything there, the largest over the pairs; `loss`
    the small model's then.
    """

    small_tokens: float
    large_tokens: float
    loss: float
    saved: float
    low: float
    high: float
    needed: float


def saved_share(pair: Pair, cost_ratio: float, tokens: float, small_tokens: np.ndarray, kept: float) -> np.ndarray:
    """Share of the cost of `tokens` from scratch that growth after each of `small_tokens` saves; below 0 a loss.

    `cost_ratio` is c_s / c_l.
    """
    return (kept * pair.equal_tokens(small_tokens) - cost_ratio * small_tokens) / tokens


def best_growth(
    pairs: Sequence[Pair], cost_ratio: float, tokens: float, kept: Kept | None = None
) -> GrowthPoint | None:
    """The growth that saves most, as the mean over `pairs`; none where none saves anything.

    The interval goes over the pairs and over what the growth keeps, at that point.
    """
    kept = kept or Kept()
    grid = np.geomspace(tokens * 1e-4, tokens / cost_ratio, GRID)
    equal = np.array([pair.equal_tokens(grid) for pair in pairs])
    allowed = (kept.expected * equal <= (1 - LEAST_LARGE) * tokens).all(axis=0)
    shares = np.mean([saved_share(pair, cost_ratio, tokens, grid, kept.expected) for pair in pairs], axis=0)
    shares = np.where(allowed, shares, -np.inf)
    best = int(shares.argmax())
    if shares[best] < NOTHING:
        return None
    at = grid[best : best + 1]
    ends = [float(saved_share(p, cost_ratio, tokens, at, k)[0]) for p in pairs for k in (kept.low, kept.high)]
    return GrowthPoint(
        small_tokens=float(at[0]),
        large_tokens=tokens - kept.expected * float(equal[:, best].mean()),
        loss=float(np.mean([pair.small.loss(at[0]) for pair in pairs])),
        saved=float(shares[best]),
        low=min(ends),
        high=max(ends),
        needed=float((cost_ratio * at[0] / equal[:, best]).max()),
    )
