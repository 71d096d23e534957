"""What is known of a run as it stands, out of the lines that it writes."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.schema import RunConfig
from flm_megatron.evaluation.run_folder import run_of
from flm_megatron.evaluation.status.follow import Follower
from flm_megatron.evaluation.status.liveness import Alive, Liveness
from flm_megatron.growth.change import DONE
from flm_megatron.training.metrics.events import (
    FILE,
    GrowthEvent,
    Line,
    MetricsEvent,
    RefusedEvent,
    RestartEvent,
    SaveEvent,
    StepEvent,
    ValidationEvent,
    parse_line,
)
from flm_megatron.training.metrics.goodput import FILE as GOODPUT
from flm_megatron.training.metrics.goodput import Account, parse_time_line
from flm_megatron.training.metrics.log import duration

KEPT_LOSSES = 4096
"""Losses kept for the sparkline; of longer runs every second one is dropped again and again."""
LATE = 10.0
"""A run whose next line is this many times later than its slowest recent step is said to stand still."""
RECENT = 50


@dataclass
class Losses:
    """Losses of a run's steps, thinned so that a bounded number covers all of it."""

    values: list[float] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def add(self, loss: float) -> None:
        """One more step's loss; one that is not finite is left out."""
        if self._seen % self._every == 0 and math.isfinite(loss):
            self.values.append(loss)
        self._seen += 1
        if len(self.values) > KEPT_LOSSES:
            self.values, self._every = self.values[::2], 2 * self._every


@dataclass
class Progress:
    """What `metrics.jsonl` and `goodput.jsonl` say so far."""

    losses: Losses = field(default_factory=Losses)
    step: StepEvent | None = None
    previous: StepEvent | None = None
    validation: ValidationEvent | None = None
    growths: list[GrowthEvent] = field(default_factory=list)
    saved: SaveEvent | None = None
    restarts: int = 0
    refused: int = 0
    step_times: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, line: Line) -> None:
        """Count one more line of the metrics."""
        if isinstance(line, StepEvent):
            self.losses.add(line.loss)
            self.step_times.append(line.step_time_s)
            self.previous, self.step = self.step, line
        elif isinstance(line, ValidationEvent):
            self.validation = line
        elif isinstance(line, GrowthEvent):
            self.growths.append(line)
        elif isinstance(line, SaveEvent):
            self.saved = line
        self.restarts += isinstance(line, RestartEvent)
        self.refused += isinstance(line, RefusedEvent)

    @property
    def ranks(self) -> int | None:
        """Processes that train, as the speed of all against that of one device says."""
        if self.step is None or self.previous is None or self.previous.stage != self.step.stage:
            return None
        one = self.step.step_time_s * self.step.tokens_per_s_per_device
        gained = (self.step.tokens - self.previous.tokens) / max(1, self.step.step - self.previous.step)
        return round(gained / one) or None if math.isfinite(one) and one > 0 else None


@dataclass(frozen=True)
class RunState:
    """A run at one moment; times are of this machine's clock and files' dates."""

    run: RunConfig
    folder: Path
    alive: Alive
    holder: str
    progress: Progress
    account: Account
    last_line_s: float | None
    """Seconds since the run wrote a line; none if it has not."""
    checkpoint_age_s: float | None

    @property
    def stage_steps(self) -> int | None:
        """Steps of the stage that the last step is of; none if the run file does not have it."""
        budgets = dict(zip((stage.name for stage in self.run.stages), stage_budgets(self.run), strict=True))
        step = self.progress.step
        return budgets[step.stage].steps if step and step.stage in budgets else None

    @property
    def total_tokens(self) -> int:
        """Tokens at the end of the run."""
        return stage_budgets(self.run)[-1].end_token if self.run.stages else 0

    @property
    def stands_still(self) -> bool:
        """Whether a run that is alive has written nothing for much longer than its steps take."""
        times = self.progress.step_times
        if self.alive != "yes" or not times or self.last_line_s is None:
            return False
        return self.last_line_s > max(LATE * max(times), 60.0)

    @property
    def state(self) -> str:
        """One of `running`, `stalled`, `finished`, `stopped`, `killed`, `not started`, `unknown`."""
        if self.alive == "yes":
            return "stalled" if self.stands_still else "running"
        step = self.progress.step
        if step is not None and step.tokens >= self.total_tokens:
            return "finished"
        if self.alive != "no":
            return self.alive
        return "not started" if step is None else "stopped"

    def to_json(self) -> dict[str, object]:
        """Plain data: tokens, seconds, GiB, nats per token; what is not known is none. docs/command-line.md has it."""
        step, goodput = self.progress.step, self.account.total
        numbers = {
            name: None if step is None else _finite(getattr(step, name))
            for name in ("loss", "grad_norm", "lr", "step_time_s", "tokens_per_s_per_device", "mfu")
        }
        validation = self.progress.validation
        return {
            "run": self.run.name,
            "folder": str(self.folder),
            "state": self.state,
            "holder": self.holder,
            "stages": [stage.name for stage in self.run.stages],
            "stage": step.stage if step else None,
            "step": step.step if step else 0,
            "stage_steps": self.stage_steps,
            "tokens": step.tokens if step else 0,
            "total_tokens": self.total_tokens,
            "stage_left_s": _finite(step.eta_s) if step else None,
            **numbers,
            "peak_memory_gib": _finite(step.peak_memory_gib) if step else None,
            "ranks": self.progress.ranks,
            "validation_loss": validation.loss if validation else None,
            "growths": [_growth(event) for event in self.progress.growths],
            "restarts": self.progress.restarts,
            "refused_steps": self.progress.refused,
            "goodput": goodput.share if goodput.wall_s else None,
            "stalls_s": dict(goodput.stalls_s),
            "checkpoint": self.progress.saved.path if self.progress.saved else None,
            "checkpoint_age_s": self.checkpoint_age_s,
            "last_line_s": self.last_line_s,
        }


class Reader:
    """Reads a run's folder again and again; each time only what is new in it."""

    def __init__(self, folder: Path) -> None:
        """Raises RequestError if the folder is no run's."""
        self.folder = folder
        self.run, self._run_date = run_of(folder), _date(folder)
        self._liveness = Liveness(folder)
        self._metrics, self._times = Follower(folder / FILE), Follower(folder / GOODPUT)
        self._progress, self._account = Progress(), Account()

    def read(self, settle: bool = False) -> RunState:
        """The run as it stands; with `settle` a lease of another host is watched until it is known to live or not."""
        alive = self._liveness.settle() if settle else self._liveness.look()
        if (date := _date(self.folder)) not in (None, self._run_date):  # the run was started again
            self.run, self._run_date = run_of(self.folder), date
        anew, rows = self._metrics.gained()
        if anew:
            self._progress = Progress()
        for row in rows:
            if (line := parse_line(row)) is not None and _is_of(self.run, line):
                self._progress.add(line)
        anew, rows = self._times.gained()
        if anew:
            self._account = Account()
        for row in rows:
            if (spent := parse_time_line(row)) is not None:
                self._account.add(spent)
        saved = self._progress.saved
        return RunState(
            self.run,
            self.folder,
            alive,
            self._liveness.holder if alive != "no" else "",
            self._progress,
            self._account,
            _age(self.folder / GOODPUT),
            _age(self.folder / saved.path) if saved else None,
        )


def _date(folder: Path) -> int | None:
    """When the run file in a folder was written."""
    try:
        return (folder / "run.yaml").stat().st_mtime_ns
    except OSError:
        return None


def _is_of(run: RunConfig, line: Line) -> bool:
    """Whether a line is of a stage of the run file, which may have been changed since."""
    return isinstance(line, MetricsEvent) and line.stage in {stage.name for stage in run.stages}


def _growth(event: GrowthEvent) -> dict[str, object]:
    """A change of shape as plain data: losses before and after in the training precision, where measured."""
    last = event.certificate.comparisons[-1] if event.certificate else None
    return {
        "stage": event.stage,
        "tokens": event.tokens,
        "change": event.change,
        "loss_before": last.loss_before if last else None,
        "loss_after": last.loss_after if last else None,
    }


def growth_line(event: GrowthEvent) -> str:
    """A change of shape in one line."""
    last = event.certificate.comparisons[-1] if event.certificate else None
    losses = f": loss {last.loss_before:.6f} before, {last.loss_after:.6f} after" if last else ""
    return f"{DONE[event.change]} into {event.stage}{losses}"


def _age(path: Path) -> float | None:
    """Seconds since the last change of a file or folder; none if it is not there."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _finite(number: float | None) -> float | None:
    """A number as JSON can have it."""
    return number if number is not None and math.isfinite(number) else None


def goodput_line(account: Account) -> str:
    """Goodput and the stalls that took longest, in one line."""
    total = account.total
    parts = sorted(((seconds, name) for name, seconds in total.parts.items() if seconds >= 0.5), reverse=True)[:3]
    rest = ", ".join(f"{name} {duration(seconds)}" for seconds, name in parts)
    return f"{100 * total.share:.1f} % of {duration(total.wall_s)}" + (f" ({rest})" if rest else "")
