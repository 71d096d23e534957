"""Refuses steps whose loss or gradient norm is not finite or far above those of the steps before.

Values that stay high are not a spike. Outliers in a row that agree with each other, or come down, are a new level, such
as that of other data: the last of them is applied, and the window moves to the new level and keeps its spread. New
levels that follow each other too fast are a divergence.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from flm_megatron.checkpoint.manifest import SpikeState
from flm_megatron.config.schema import StabilityConfig
from flm_megatron.errors import FlmError

SMALLEST_SPREAD = 1e-3
"""Smallest spread, as a fraction of the mean: a window of nearly equal values has almost none."""
AGREEMENT = 0.1
"""Outliers agree if none exceeds an earlier one by more than this fraction, or by `sigmas` of the window's spread."""
MOST_LEVELS = 4
"""New levels allowed within a window's length; one more is a divergence."""
MOST_RISE = 0.25
"""A loss that exceeds a new level by more than this fraction within a window's length is a divergence too."""
Values = Mapping[str, float]


class SpikeWatch:
    """Remembers losses and gradient norms of applied steps and says which new ones are outliers.

    Its state is part of checkpoints, so that a resumed run decides as an uninterrupted one would.
    """

    def __init__(self, config: StabilityConfig, saved: SpikeState | None = None) -> None:
        """Start empty, or from the result of `state`."""
        self.config = config
        saved = saved or SpikeState()
        self._windows = {
            "loss": Window(deque(saved.loss, config.window_steps), logarithmic=False),
            "grad_norm": Window(deque(saved.grad_norm, config.window_steps), logarithmic=True),
        }
        self._refused = list(saved.refused or [])
        self.in_a_row = list(saved.in_a_row) if saved.refused is not None else []
        # Steps applied since each new level, as long as they are fewer than a window holds, and the loss if it has one.
        self._levels = list(saved.levels)
        self.skipped = saved.skipped

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this loss and gradient norm must not be applied; none if it may. Changes nothing."""
        values = {"loss": loss, "grad_norm": grad_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self._diverges(values):
            age, level = self._loss_levels()[0]
            rise = 100 * (loss / level - 1)
            since = {0: "no step", 1: "1 step"}.get(age, f"{age} steps")
            return f"loss {loss:.6g} is {rise:.0f} % above {level:.6g}, a new level with {since} applied since"
        outliers = self._outliers(values)
        if not outliers or self._new_level(values):
            return None
        name = outliers[0]
        window = self._windows[name]
        mean = "geometric mean" if window.logarithmic else "mean"
        return (
            f"{name} {values[name]:.6g} is {window.sigmas(values[name]):.1f} sigma above {window.mean:.6g}, the {mean} "
            f"of {len(window.values)} steps"
        )

    def _diverges(self, values: Values) -> bool:
        """Whether the loss keeps rising after a new level."""
        return any(values["loss"] > (1 + MOST_RISE) * level for _, level in self._loss_levels()[:1])

    def _loss_levels(self) -> list[tuple[int, float]]:
        return [(age, level) for age, level in self._levels if level is not None]

    def _outliers(self, values: Values) -> list[str]:
        """Names of the values that are too far above the window; none until the window has enough values."""
        limit = self.config.sigmas
        if not limit:
            return []
        enough = self.config.window_steps // 2
        windows = {name: window for name, window in self._windows.items() if len(window.values) >= enough}
        return [name for name, window in windows.items() if window.sigmas(values[name]) > limit]

    def _new_level(self, values: Values) -> list[str]:
        """Names of the values that reach a new level with this step: enough finite outliers in a row agree."""
        recent = self._recent(values)
        if not recent or len(self._levels) >= MOST_LEVELS or self.config.policy == "stop":
            return []
        names = [name for name in values if any(name in self._outliers(seen) for seen in recent)]
        agree = all(self._windows[name].agree([seen[name] for seen in recent], self.config.sigmas) for name in names)
        return names if agree else []

    def _recent(self, values: Values) -> list[Values]:
        """The steps that would make a level together with this one, and this one; none if they are too few."""
        needed = min(self.config.new_level_steps, self.config.max_in_a_row)
        before = [seen for seen in self._refused[-(needed - 1) :] if seen is not None]
        return [*before, values] if len(before) == needed - 1 > 0 else []

    def applied(self, loss: float, grad_norm: float) -> str | None:
        """Remember a step that was applied; returns a message if it begins a new level."""
        values = {"loss": loss, "grad_norm": grad_norm}
        moved = self._new_level(values) if self._outliers(values) else []
        told = [self._move(name, values[name]) for name in moved]
        self._levels = [(age + 1, level) for age, level in self._levels if age + 1 < self.config.window_steps]
        self._levels += [(0, loss if "loss" in moved else None)] * bool(moved)
        for name, value in values.items():
            self._windows[name].append(value)
        count, self.in_a_row, self._refused = len(self.in_a_row), [], []
        return f"{', '.join(told)}; {_steps(count)} refused before it" if told else None

    def _move(self, name: str, level: float) -> str:
        """Move the window of `name` to a new level."""
        window = self._windows[name]
        before = window.mean
        window.move(level)
        return f"new level of {name}: {window.mean:.6g} after {before:.6g}"

    def refused(self, step: int, reason: str, samples: str, loss: float, grad_norm: float) -> None:
        """Remember a step that was not applied.

        Raises:
            FlmError: it was the last that the policy allows; says what was seen, and what to do.
        """
        self.skipped += 1
        self.in_a_row.append(f"step {step} ({samples}): {reason}")
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self._refused.append({"loss": loss, "grad_norm": grad_norm} if finite else None)
        allowed = 1 if self.config.policy == "stop" else self.config.max_in_a_row
        if len(self.in_a_row) >= allowed:
            raise FlmError(
                f"{_steps(allowed)} refused, none of them was applied: {'; '.join(self.in_a_row)}; the last checkpoint "
                f"is untouched. {self._advice()}"
            )

    def _advice(self) -> str:
        """What the user can do about refused steps: the same command would meet the same samples again."""
        if None in self._refused:
            return (
                "Look at the samples with `flm data show`; values that are not finite come from a learning rate that "
                "is too high, from damaged data or from a faulty device (stability.checksum_interval_steps finds one)"
            )
        look = "Look at the samples with `flm data show`. If they are fit to be trained on, "
        if self.config.policy == "stop":
            return (
                f"{look}set stability.policy to skip, which leaves them out and takes a lasting change as a new level"
            )
        if self._levels:
            return (
                "It goes on rising from a new level: the run diverges, or the data change all the time. Lower the "
                "learning rate and go on from an earlier checkpoint, or raise stability.sigmas to let them through"
            )
        return (
            f"{look}raise stability.max_in_a_row to pass a longer burst, or stability.sigmas to let them through; if "
            "the values keep rising, lower the learning rate and go on from an earlier checkpoint"
        )

    def state(self) -> SpikeState:
        """The part that a checkpoint keeps."""
        return SpikeState(
            loss=list(self._windows["loss"].values),
            grad_norm=list(self._windows["grad_norm"].values),
            in_a_row=list(self.in_a_row),
            refused=list(self._refused),
            levels=list(self._levels),
            skipped=self.skipped,
        )


@dataclass
class Window:
    """The last values of one kind. Gradient norms are about log-normal, so their logarithms are used."""

    values: deque[float]
    logarithmic: bool

    @property
    def mean(self) -> float:
        """The mean; the geometric one where logarithms are used."""
        return self._unscaled(fmean(self._scaled(self.values)))

    def sigmas(self, value: float) -> float:
        """Standard deviations that `value` lies above the mean."""
        seen = self._scaled(self.values)
        return (self._scaled([value])[0] - fmean(seen)) / self._spread(seen)

    def agree(self, values: Sequence[float], sigmas: float) -> bool:
        """Whether values, in order, rise no further than values of one level do."""
        scaled = self._scaled(values)
        rise = max(later - before for at, later in enumerate(scaled) for before in scaled[: at + 1])
        share = AGREEMENT if self.logarithmic else AGREEMENT * abs(scaled[-1])
        return rise <= max(share, sigmas * self._spread(self._scaled(self.values)))

    def append(self, value: float) -> None:
        """Remember a value; a norm of zero has no logarithm and is skipped."""
        if value > 0 or not self.logarithmic:
            self.values.append(value)

    def move(self, level: float) -> None:
        """Shift all values so that their mean is `level`; the spread stays."""
        seen = self._scaled(self.values)
        shift = self._scaled([level])[0] - fmean(seen)
        self.values = deque((self._unscaled(value + shift) for value in seen), self.values.maxlen)

    def _spread(self, seen: Sequence[float]) -> float:
        mean = fmean(seen)
        deviation = math.sqrt(fmean((value - mean) ** 2 for value in seen))
        return max(deviation, SMALLEST_SPREAD if self.logarithmic else SMALLEST_SPREAD * abs(mean), 1e-30)

    def _scaled(self, values: Iterable[float]) -> list[float]:
        return [math.log(max(value, 1e-30)) for value in values] if self.logarithmic else list(values)

    def _unscaled(self, value: float) -> float:
        return math.exp(value) if self.logarithmic else value


def _steps(count: int) -> str:
    return "a step was" if count == 1 else f"{count} steps in a row were"


def joined(names: Iterable[str], most: int = 8) -> str:
    """The first `most` sample names in one line."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
