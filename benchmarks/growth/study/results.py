"""What was saved: FLOPs of the run from scratch that ends at the same loss, from its own decayed ends."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.growth.study.runs import SCRATCH, Result
from flm_megatron.planner.loss_law import first_reached

Curve = list[tuple[float, float]]
"""(FLOPs, loss at the end of the decay) of one seed from scratch, in order."""


@dataclass(frozen=True)
class Saving:
    """What one grown run saved against the same seed from scratch.

    `equal` are the FLOPs T_eq at which the run from scratch ends at the same loss, none beyond its largest or below
    its smallest budget; `beyond` are then the FLOPs of its largest, where that ends above. `credit` is the token
    credit: tokens of the large model that a token of the small one stood for, (T_eq in tokens - large tokens) / small
    tokens.
    """

    result: Result
    equal: float | None
    credit: float | None
    beyond: float | None = None

    @property
    def saved(self) -> float | None:
        """1 - T / T_eq."""
        return None if self.equal is None else 1 - self.result.flops / self.equal

    @property
    def saved_more_than(self) -> float | None:
        """The bound, where T_eq is beyond the largest budget."""
        return None if self.beyond is None else 1 - self.result.flops / self.beyond


@dataclass(frozen=True)
class Line:
    """All seeds of one arm, growth point and budget."""

    arm: str
    grown_at: float
    budget: float
    savings: tuple[Saving, ...]

    @property
    def losses(self) -> list[float]:
        """Final losses by seed."""
        return [saving.result.loss for saving in self.savings]

    @property
    def saved(self) -> list[float]:
        """Shares saved, of the seeds for which they are known."""
        return [s for saving in self.savings if (s := saving.saved) is not None]

    @property
    def least(self) -> list[float]:
        """Shares saved, or what they are more than where the run from scratch of the same seed was too short."""
        each = (s.saved if s.saved is not None else s.saved_more_than for s in self.savings)
        return [share for share in each if share is not None]

    @property
    def known(self) -> bool:
        """Whether every seed lies within the curve from scratch."""
        return len(self.saved) == len(self.savings)

    @property
    def mean(self) -> float:
        """Mean share saved."""
        return fmean(self.saved)

    @property
    def spread(self) -> float:
        """Standard deviation of the share saved over seeds; infinite for one seed."""
        return stdev(self.saved) if len(self.saved) > 1 else math.inf

    @property
    def claimed(self) -> bool:
        """Whether the saving is known and further from nothing than twice its spread."""
        return self.known and abs(self.mean) > 2 * self.spread


def lines(results: Sequence[Result], flops_per_token: float) -> list[Line]:
    """One line for each arm, growth point and budget, against the curve of the same seed."""
    curves: dict[int, Curve] = defaultdict(list)
    for result in sorted(results, key=lambda r: r.flops):
        if result.arm == SCRATCH:
            curves[result.seed].append((result.flops, result.loss))
    found: dict[tuple[str, float, float], list[Saving]] = defaultdict(list)
    for result in results:
        if result.arm != SCRATCH and result.seed in curves:
            found[result.arm, result.grown_at, result.budget].append(
                _saving(result, curves[result.seed], flops_per_token)
            )
    return [
        Line(*key, tuple(sorted(savings, key=lambda s: s.result.seed)))
        for key, savings in sorted(found.items(), key=lambda item: (item[0][2], item[0][1], item[0][0]))
    ]


def _saving(result: Result, curve: Curve, flops_per_token: float) -> Saving:
    equal = first_reached(curve, result.loss)
    credit = None if equal is None else (equal / flops_per_token - result.large_tokens) / result.small_tokens
    beyond = curve[-1][0] if result.loss < curve[-1][1] else None
    return Saving(result, equal, credit, beyond)
