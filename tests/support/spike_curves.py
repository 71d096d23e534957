"""Losses and gradient norms of runs as their owners describe them, made up with a seed, and what the guard does there.

    python -m tests.support.spike_curves      # the table of benchmarks/reliability/spikes.md

A curve is replayed as it stands: a step that is refused does not change what follows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from flm_megatron.config.schema import StabilityConfig
from flm_megatron.errors import FlmError
from flm_megatron.training.spikes import SpikeWatch

SEEDS = range(5)
LOSS, NOISE, LOG_NOISE = 2.4, 0.01, 0.12
"""Of a quiet stretch: the loss, its noise from batch to batch as a share, and that of the logarithm of the norm."""


@dataclass
class Curve:
    """Loss and gradient norm of every step, and the steps that are spikes."""

    losses: list[float]
    norms: list[float]
    spikes: set[int] = field(default_factory=set)

    def scale(self, step: int, loss: float = 1.0, norm: float = 1.0, spike: bool = False) -> None:
        """Multiply what a step measured."""
        self.losses[step] *= loss
        self.norms[step] *= norm
        self.spikes |= {step} if spike else set()


def quiet(draw: random.Random, steps: int = 800, noise: float = NOISE, log_noise: float = LOG_NOISE) -> Curve:
    """A stretch in which nothing happens: the loss falls slowly."""
    losses = [LOSS * (1 - 2e-5 * step) * (1 + draw.gauss(0, noise)) for step in range(steps)]
    return Curve(losses, [0.4 * math.exp(draw.gauss(0, log_noise)) for _ in range(steps)])


def warm_up(draw: random.Random) -> Curve:
    """From the first step: the loss falls from ln(80,000), the norm rises to a maximum and falls again."""
    curve = quiet(draw)
    for step in range(len(curve.losses)):
        curve.scale(step, loss=1 + 3.7 * (1 + step / 40) ** -1.3, norm=1 + 25 * (step / 60) * math.exp(1 - step / 60))
    return curve


def heavy_tails(draw: random.Random) -> Curve:
    """Gradient norms that vary by half, as those of small batches do."""
    return quiet(draw, steps=3000, log_noise=0.4)


def single_spikes(draw: random.Random) -> Curve:
    """PaLM's: about twenty, at irregular intervals, of one step; loss and norm together."""
    curve = quiet(draw, steps=2000)
    for step in draw.sample(range(100, 2000, 7), 20):
        curve.scale(step, loss=draw.uniform(1.15, 2.5), norm=draw.uniform(3, 30), spike=True)
    return curve


def norm_spikes(draw: random.Random) -> Curve:
    """Of the norm alone, one step each: what OLMo traced to repeated n-grams."""
    curve = quiet(draw, steps=2000)
    for step in draw.sample(range(100, 2000, 7), 20):
        curve.scale(step, norm=draw.uniform(4, 50), spike=True)
    return curve


def small_spikes(draw: random.Random) -> Curve:
    """Of one to four standard deviations: the noise of an ordinary run."""
    curve = quiet(draw, steps=2000)
    for step in draw.sample(range(100, 2000, 7), 20):
        curve.scale(step, loss=1 + NOISE * draw.uniform(1, 4))
    return curve


def bursts(draw: random.Random) -> Curve:
    """OLMo's: the loss jumps and comes back within 5 to 20 steps, the norm with it. The jump is the spike."""
    curve = quiet(draw, steps=2000)
    for start in (300, 800, 1300, 1800):
        length, height = draw.randint(5, 20), draw.uniform(0.2, 0.6)
        for step in range(length):
            left = 1 - step / length
            curve.scale(start + step, loss=1 + height * left, norm=1 + 9 * left, spike=step == 0)
    return curve


def norm_bursts(draw: random.Random) -> Curve:
    """The norm is ten times as high for 5 to 20 steps, the loss is not."""
    curve = quiet(draw, steps=2000)
    for start in (300, 800, 1300, 1800):
        for step in range(draw.randint(5, 20)):
            curve.scale(start + step, norm=10, spike=step == 0)
    return curve


def erratic_bursts(draw: random.Random) -> Curve:
    """The loss jumps up and down for 5 to 20 steps."""
    curve = quiet(draw, steps=2000)
    for start in (300, 800, 1300, 1800):
        for step in range(draw.randint(5, 20)):
            curve.scale(start + step, loss=draw.uniform(1.2, 3), norm=draw.uniform(3, 30), spike=step == 0)
    return curve


def shift(factor: float, noise: float = 1.0, ramp: int = 1) -> Callable[[random.Random], Curve]:
    """Other data from step 400 on: the loss times `factor`, its noise times `noise`, in `ramp` steps."""

    def curve(draw: random.Random) -> Curve:
        before, after = quiet(draw), quiet(draw, noise=NOISE * noise)
        for step in range(400, 800):
            part = min(1.0, (step - 399) / ramp)
            before.losses[step] = after.losses[step] * (1 + (factor - 1) * part)
        return before

    return curve


def rising_norm(draw: random.Random) -> Curve:
    """The norm grows to its tenfold over 2,000 steps."""
    curve = quiet(draw, steps=2000)
    for step in range(2000):
        curve.scale(step, norm=10 ** (step / 2000))
    return curve


def rewarmed(draw: random.Random) -> Curve:
    """The learning rate goes back to its peak: the loss rises by 6 % in 60 steps and comes back in 300."""
    curve = quiet(draw)
    for step in range(300, 660):
        since = step - 300
        curve.scale(step, loss=1 + 0.06 * min(since / 60, (360 - since) / 300), norm=1.5)
    return curve


def divergence(rate: float) -> Callable[[random.Random], Curve]:
    """From step 400 on the loss grows by `rate` of itself at each step, up to that of a uniform guess."""

    def curve(draw: random.Random) -> Curve:
        made = quiet(draw)
        for step in range(400, 800):
            made.losses[step] = min(11.3, made.losses[step] * (1 + rate) ** (step - 400))
        return made

    return curve


def nan(steps: int) -> Callable[[random.Random], Curve]:
    """The loss is not a number for some steps."""

    def curve(draw: random.Random) -> Curve:
        made = quiet(draw)
        for step in range(400, 400 + steps):
            made.scale(step, loss=math.nan, spike=True)
        return made

    return curve


CURVES: dict[str, Callable[[random.Random], Curve]] = {
    "nothing happens": quiet,
    "warm-up": warm_up,
    "heavy-tailed gradient norms": heavy_tails,
    "20 spikes of one step, loss and norm": single_spikes,
    "20 spikes of one step, norm alone": norm_spikes,
    "20 bumps of 1 to 4 sigma": small_spikes,
    "4 bursts of 5 to 20 steps": bursts,
    "4 bursts of 5 to 20 steps, up and down": erratic_bursts,
    "4 bursts of the norm, 5 to 20 steps": norm_bursts,
    "data shift +25 %": shift(1.25),
    "data shift +25 % over 20 steps": shift(1.25, ramp=20),
    "data shift +25 %, noise doubled": shift(1.25, noise=2),
    "data shift -20 %": shift(0.8),
    "batch four times as large": shift(1, noise=0.5),
    "batch a quarter as large": shift(1, noise=2),
    "norm rises tenfold in 2,000 steps": rising_norm,
    "learning rate rewound": rewarmed,
    "loss grows by 0.1 % a step": divergence(0.001),
    "loss grows by 1 % a step": divergence(0.01),
    "loss grows by 10 % a step": divergence(0.1),
    "one loss that is not a number": nan(1),
    "losses that are not numbers from then on": nan(400),
}


@dataclass(frozen=True)
class Outcome:
    """What the guard did on one curve: the steps it refused, the step at which it ended the run, its new levels."""

    spikes: set[int]
    refused: list[int]
    ended: int | None
    levels: int


def replay(curve: Curve, config: StabilityConfig | None = None) -> Outcome:
    """Show a curve to the guard, step by step."""
    watch, refused, levels = SpikeWatch(config or StabilityConfig()), list[int](), 0
    for step, (loss, norm) in enumerate(zip(curve.losses, curve.norms, strict=True)):
        reason = watch.reason(loss, norm)
        if reason is None:
            levels += watch.applied(loss, norm) is not None
            continue
        refused.append(step)
        try:
            watch.refused(step, reason, "samples", loss, norm)
        except FlmError:
            return Outcome(curve.spikes, refused, step, levels)
    return Outcome(curve.spikes, refused, None, levels)


def replays(name: str, seeds: range = SEEDS) -> list[Outcome]:
    """The outcomes of one curve for every seed."""
    return [replay(CURVES[name](random.Random(seed))) for seed in seeds]


def table() -> str:
    """All curves in Markdown, added up over the seeds."""
    lines = ["| curve | spikes | caught | other steps refused | new levels | runs ended |", "|---|---|---|---|---|---|"]
    for name in CURVES:
        outcomes = replays(name)
        spikes = sum(len(each.spikes) for each in outcomes)
        caught = sum(len(each.spikes & set(each.refused)) for each in outcomes)
        others = sum(len(set(each.refused) - each.spikes) for each in outcomes)
        ended = sum(each.ended is not None for each in outcomes)
        levels = sum(each.levels for each in outcomes)
        lines.append(f"| {name} | {spikes} | {caught} | {others} | {levels} | {ended} of {len(outcomes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
