"""How much of the time a run that fails now and then really trains, and how often it should save.

Failures come at random, one in `mtbf_s` seconds on average. Between two saves lie `interval_s` seconds of training,
and training stands still for `stall_s` at each. A failure loses what was trained since the last save that is whole on
the disk, and then `restart_s`. With exponential times between failures the expected wall time of an interval is
(Daly 2006, doi 10.1016/j.future.2004.11.016)

    M exp(R / M) (exp((interval + stall) / M) - 1)

Here R is the restart, and the time for which a save in the background is not whole yet: a failure in it loses the
interval before as well. The interval that wastes least follows exactly from that; for short stalls it is near Young's
sqrt(2 x stall x M).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flm_megatron.config.schema import CheckpointConfig
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.plan import HOUR, StagePlan

NEWTON_STEPS = 60


@dataclass(frozen=True)
class Reliability:
    """What failures, saves and restarts cost a stage, in seconds."""

    mtbf_s: float
    """Mean time between failures of the whole job."""
    stall_s: float
    """Time that training stands still at each save."""
    save_s: float
    """Time from the start of a save until it is complete on disk."""
    restart_s: float
    """From a failure to the next step."""

    def goodput(self, interval_s: float) -> float:
        """Fraction of wall time that is useful training, with `interval_s` of training between saves."""
        lag = max(0.0, self.save_s - self.stall_s)
        m = self.mtbf_s
        try:
            wall = m * math.exp((self.restart_s + lag) / m) * math.expm1((interval_s + self.stall_s) / m)
        except OverflowError:
            return 0.0
        return interval_s / wall

    @property
    def best_interval_s(self) -> float:
        """The interval with the highest goodput: where exp((t + stall) / M) (1 - t / M) = 1; not below a save."""
        m, offset = self.mtbf_s, self.stall_s / self.mtbf_s
        x = min(math.sqrt(2 * offset), 1.0) if offset else 0.0
        for _ in range(NEWTON_STEPS if offset else 0):
            value = math.exp(x + offset) * (1 - x) - 1
            x = min(max(x + value / (math.exp(x + offset) * x), x / 2), (x + 1) / 2)
        return max(x * m, self.save_s - self.stall_s)

    @property
    def young_interval_s(self) -> float:
        """Young's rule (1974): sqrt(2 x stall x M)."""
        return math.sqrt(2 * self.stall_s * self.mtbf_s)


@dataclass(frozen=True)
class GoodputPlan:
    """One stage: its reliability, the interval of the run file (none: it saves at the end only) and the best one."""

    stage: str
    reliability: Reliability
    step_s: float
    train_s: float
    configured_steps: int | None
    gpus: int

    @property
    def best_steps(self) -> int:
        """The best interval in whole steps."""
        return max(1, round(self.reliability.best_interval_s / self.step_s))

    def goodput(self, steps: int | None) -> float:
        """Goodput with a save every `steps` steps; with none, only at the end of the stage."""
        return self.reliability.goodput(self.train_s if steps is None else min(steps * self.step_s, self.train_s))

    def saved_gpu_hours(self, **change: float) -> float:
        """The value of a better save or restart: GPU-hours saved, each at its best interval."""
        better = replace(self, reliability=replace(self.reliability, **change))
        wall = self.train_s / self.goodput(self.best_steps) - self.train_s / better.goodput(better.best_steps)
        return self.gpus * wall / HOUR


def plan_goodput(
    stages: Sequence[StagePlan], checkpoint: CheckpointConfig, machine: Machine, gpus: int, mtbf_gpu_hours: float
) -> list[GoodputPlan]:
    """Goodput of every stage on `gpus` accelerators that each fail once in `mtbf_gpu_hours` on average.

    A save that training waits for stalls it until the storage has all of it; one in the background only while each
    accelerator copies its shard to the host.
    """
    plans = []
    for stage in stages:
        save = stage.checkpoint_bytes / (machine.storage_gb_per_s * 1e9)
        copy = stage.checkpoint_bytes / gpus / (machine.host_gb_per_s * 1e9)
        stall = copy if checkpoint.asynchronous else save
        reliability = Reliability(mtbf_gpu_hours * HOUR / gpus, stall, copy + save, machine.restart_s)
        plans.append(
            GoodputPlan(
                stage=stage.name,
                reliability=reliability if checkpoint.asynchronous else replace(reliability, save_s=save),
                step_s=stage.step.total,
                train_s=stage.steps * stage.step.total,
                configured_steps=checkpoint.interval_steps or None,
                gpus=gpus,
            )
        )
    return plans
