"""Steps that must not be applied: loss or gradient norm not finite, or far above those of the steps before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import fmean, pstdev
from typing import Any

from flm_megatron.config.schema import StabilityConfig
from flm_megatron.errors import FlmError

# A window of nearly equal values has nearly no spread; less than this share of the mean is noise.
SMALLEST_SPREAD = 1e-3


class SpikeWatch:
    """Remembers the losses and gradient norms of applied steps and says which new ones do not belong with them.

    Its state goes into checkpoints, so that a run that is resumed decides as one that never stopped.
    """

    def __init__(self, config: StabilityConfig, saved: dict[str, Any] | None = None) -> None:
        self.config = config
        saved = saved or {}
        self._seen = {name: deque[float](saved.get(name, []), config.window_steps) for name in ("loss", "grad_norm")}
        self.in_a_row: list[str] = list(saved.get("in_a_row", []))
        self.skipped: int = saved.get("skipped", 0)

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this loss and gradient norm must not be applied; none if it may. Changes nothing."""
        values = {"loss": loss, "grad_norm": grad_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        for name, value in values.items():
            away = self._sigmas(self._seen[name], value)
            if self.config.sigmas and away > self.config.sigmas:
                seen = self._seen[name]
                return f"{name} {value:.6g} is {away:.1f} sigma above {fmean(seen):.6g}, the mean of {len(seen)} steps"
        return None

    def _sigmas(self, seen: deque[float], value: float) -> float:
        """Standard deviations that `value` lies above the mean of what was seen; 0 before there is enough of it."""
        if len(seen) < self.config.window_steps // 2:
            return 0.0
        mean = fmean(seen)
        return (value - mean) / max(pstdev(seen, mean), SMALLEST_SPREAD * abs(mean), 1e-30)

    def applied(self, loss: float, grad_norm: float) -> None:
        """Remember a step that was applied."""
        self._seen["loss"].append(loss)
        self._seen["grad_norm"].append(grad_norm)
        self.in_a_row = []

    def refused(self, step: int, reason: str, samples: str) -> None:
        """Remember a step that was not applied.

        Raises:
            FlmError: it was the last that the policy allows; says what was seen.
        """
        self.skipped += 1
        self.in_a_row.append(f"step {step} ({samples}): {reason}")
        allowed = 1 if self.config.policy == "stop" else self.config.max_in_a_row
        if len(self.in_a_row) >= allowed:
            raise FlmError(
                f"{_steps(allowed)} refused, none of them was applied: {'; '.join(self.in_a_row)}; the last checkpoint "
                "is untouched: look at the samples with `flm data show`, lower the learning rate, or set stability"
            )

    def to_json(self) -> dict[str, Any]:
        """What `saved` takes."""
        seen = {name: list(values) for name, values in self._seen.items()}
        return {**seen, "in_a_row": self.in_a_row, "skipped": self.skipped}


def _steps(count: int) -> str:
    return "a step was" if count == 1 else f"{count} steps in a row were"


def joined(names: Iterable[str], most: int = 8) -> str:
    """Sample names in one line, the first `most` of them."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
