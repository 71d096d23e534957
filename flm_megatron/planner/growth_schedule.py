"""How many tokens to give each stage of a growing run, for the lowest loss of the last size within a budget.

A grown model is taken to go on along its own size's law from the loss at which it was grown: growth that preserves
the function, and no loss of training efficiency. Where that is too kind, late growth is favoured less than here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flm_megatron.errors import RequestError
from flm_megatron.planner.loss_law import LossLaw

LEVELS = 4000
FIRST_TOKENS = 1e6


@dataclass(frozen=True)
class GrowthSchedule:
    """Tokens of each stage, the loss at the end of each, and what the last size reaches alone for the same money."""

    tokens: list[float]
    losses: list[float]
    budget: float
    loss_from_scratch: float

    @property
    def loss(self) -> float:
        """Loss at the end."""
        return self.losses[-1]


def best_schedule(laws: Sequence[LossLaw], cost_per_token: Sequence[float], budget: float) -> GrowthSchedule:
    """Tokens per stage for the lowest final loss within `budget`, in the unit of `cost_per_token`.

    Over a grid of losses, from high to low: the cheapest way to reach a loss at a size is to come down to it at that
    size, or to grow there from the size before.

    Raises:
        RequestError: the budget is too small to train the last size at all.
    """
    start = min(float(law.loss(FIRST_TOKENS)) for law in laws)
    levels = np.linspace(start, min(law.floor for law in laws), LEVELS)
    needed = np.array([law.tokens(levels) for law in laws])
    spent, grown = _cheapest(needed, np.asarray(cost_per_token))
    within = np.flatnonzero(spent[-1] <= budget)
    if not len(within):
        raise RequestError(f"a budget of {budget:.4g} is less than the last stage's first tokens cost; raise it")
    return _schedule(laws, cost_per_token, budget, levels, needed, grown, int(within[-1]))


def _cheapest(needed: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost to be at each level at each size [size, level], and whether the size was grown into at that level."""
    sizes, levels = needed.shape
    with np.errstate(invalid="ignore"):
        steps = np.diff(needed, axis=1, prepend=0.0) * cost[:, None]
    steps = np.where(np.isfinite(steps), steps, np.inf)
    spent, grown = np.full((sizes, levels), np.inf), np.zeros((sizes, levels), dtype=bool)
    for level in range(levels):
        for size in range(sizes):
            before = spent[size, level - 1] if level else 0.0
            spent[size, level] = before + steps[size, level]
            if size and spent[size - 1, level] < spent[size, level]:
                spent[size, level], grown[size, level] = spent[size - 1, level], True
    return spent, grown


def _schedule(
    laws: Sequence[LossLaw],
    cost: Sequence[float],
    budget: float,
    levels: np.ndarray,
    needed: np.ndarray,
    grown: np.ndarray,
    last: int,
) -> GrowthSchedule:
    tokens, losses = [0.0] * len(laws), [0.0] * len(laws)
    level = last
    for size in reversed(range(len(laws))):
        losses[size] = float(levels[level])
        end = needed[size, level]
        while size and not grown[size, level] and level:
            level -= 1
        begin = needed[size, level] if size and grown[size, level] else 0.0
        tokens[size] = float(end - begin)
    alone = float(laws[-1].loss(budget / cost[-1]))
    return GrowthSchedule(tokens, losses, budget, alone)
