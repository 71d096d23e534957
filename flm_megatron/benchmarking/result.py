"""What one program under one layout was measured to do."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Measurement:
    """Times in seconds, memory in GiB, FLOPs per token of the whole model; the slowest process counts.

    `memory_gib` is the largest that one process held for the model: its peak in a step less what it held before
    the model was there. `planned_gib` is the planner's figure for it, none where there is no plan.
    """

    program: str
    layout: str
    processes: int
    step_times_s: list[float]
    step_tokens: int
    model_flops_per_token: float
    hardware_flops_per_token: float
    peak_tflops: float | None
    memory_gib: float
    planned_gib: float | None = None
    parts_s: dict[str, float] = field(default_factory=dict)

    @property
    def step_time_s(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.step_times_s)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median: the noise of a step."""
        if len(self.step_times_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.step_times_s, n=4, method="inclusive")
        return (high - low) / 2 / self.step_time_s

    @property
    def tokens_per_s(self) -> float:
        """Of all processes together."""
        return self.step_tokens / self.step_time_s

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of each device."""
        return self.tokens_per_s * self.model_flops_per_token / self.processes / 1e12

    @property
    def mfu(self) -> float | None:
        """Share of the peak that the model's FLOPs make; none for an unknown device."""
        return self.tflops / self.peak_tflops if self.peak_tflops else None

    @property
    def hfu(self) -> float | None:
        """The same with recomputed FLOPs."""
        return self.mfu * self.hardware_flops_per_token / self.model_flops_per_token if self.mfu is not None else None

    def to_json(self) -> dict[str, object]:
        """Everything measured and what follows from it, as plain data."""
        names = ("step_time_s", "spread", "tokens_per_s", "tflops", "mfu", "hfu")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}
