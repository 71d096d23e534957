"""Where a run's wall time went: steps that count, lost steps, stalls, starts, and time without a process.

The main rank adds a line to `goodput.jsonl` for every step and stall. Unlike `metrics.jsonl` the file is never
truncated, so it keeps what was trained and lost.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import psutil
from pydantic import TypeAdapter, ValidationError

from flm_megatron.training.metrics.log import duration

if TYPE_CHECKING:
    from flm_megatron.training.telemetry.observers import Observers

FILE = "goodput.jsonl"
Stall = Literal["save", "copy", "validation", "evaluation", "replicas", "rollback"]


@dataclass(frozen=True)
class BeginLine:
    """At `time` a process, started at `started`, begins to train stage number `index` after `step` steps of it.

    Times of lines are in seconds since 1970.
    """

    what: Literal["begin"]
    time: float
    index: int
    stage: str
    step: int
    started: float


@dataclass(frozen=True)
class StepLine:
    """At `time` a step ends that took `seconds`, after waiting `data_s` for its samples; applied, or refused."""

    what: Literal["step", "refused"]
    time: float
    step: int
    seconds: float
    data_s: float = 0.0


@dataclass(frozen=True)
class StallLine:
    """At `time` training goes on after it stood still for `seconds`; a rollback goes back to `step`."""

    what: Stall
    time: float
    seconds: float
    step: int | None = None


Line = BeginLine | StepLine | StallLine
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class Meter:
    """Writes the file in `folder`, on the main rank, and tells the rank's observers; without both it does nothing."""

    def __init__(self, folder: Path | None, observers: Observers | None = None) -> None:
        self.folder, self.observers = folder, observers or None
        self._file: TextIO | None = None if folder is None else _opened(folder / FILE)

    def begin(self, index: int, stage: str, step: int) -> None:
        """This process begins to train stage number `index` after `step` steps of it."""
        self._write(BeginLine("begin", time.time(), index, stage, step, psutil.Process(os.getpid()).create_time()))

    def step(self, step: int, seconds: float, data_s: float, applied: bool) -> None:
        """A step took `seconds`, after waiting `data_s` for its samples."""
        self._write(StepLine("step" if applied else "refused", time.time(), step, seconds, data_s))

    @contextmanager
    def stall(self, kind: Stall, step: int | None = None) -> Iterator[None]:
        """Training stands still during the block. A rollback gives the `step` it goes back to."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._write(StallLine(kind, time.time(), time.perf_counter() - began, step))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Line) -> None:
        if self._file is not None:
            known = {key: value for key, value in asdict(line).items() if value is not None}
            print(json.dumps(known), file=self._file, flush=True)
        if self.observers is not None:
            self.observers.time(line)


@dataclass
class Goodput:
    """Seconds of a run by where they went.

    `steps_s` holds all applied steps, `lost_s` those whose result was lost, `start_s` the time from a process's start
    (or the end of its previous stage) to its first step, `down_s` the time without a process. `starts` counts starts of
    processes: under a launcher one process trains several stages.
    """

    wall_s: float = 0.0
    steps_s: float = 0.0
    lost_s: float = 0.0
    refused_s: float = 0.0
    data_s: float = 0.0
    start_s: float = 0.0
    down_s: float = 0.0
    stalls_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    lost_steps: int = 0
    starts: int = 0

    @property
    def share(self) -> float:
        """Goodput: the fraction of wall time spent on steps that count."""
        return (self.steps_s - self.lost_s) / self.wall_s if self.wall_s else 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of everything but the steps that count, by name; `other` is the rest."""
        known = {
            "lost steps": self.lost_s,
            "refused steps": self.refused_s,
            "waiting for data": self.data_s,
            "saving": self.stalls_s["save"],
            "copying to memory": self.stalls_s["copy"],
            "validation": self.stalls_s["validation"],
            "evaluation": self.stalls_s["evaluation"],
            "comparing replicas": self.stalls_s["replicas"],
            "rolling back": self.stalls_s["rollback"],
            "starting": self.start_s,
            "not running": self.down_s,
        }
        rest = self.wall_s - (self.steps_s - self.lost_s) - sum(known.values())
        return {**known, "other": max(0.0, rest)}

    def text(self) -> str:
        """Goodput and where the rest of the time went, in one line."""
        spent = sorted(((s, name) for name, s in self.parts.items() if s >= 0.001 * self.wall_s), reverse=True)
        rest = ", ".join(f"{name} {100 * seconds / self.wall_s:.1f}%" for seconds, name in spent)
        return (
            f"goodput {100 * self.share:.1f}% of {duration(self.wall_s)} over {self.starts} starts, "
            f"{self.lost_steps} steps lost{f': {rest}' if rest else ''}"
        )


class Account:
    """Adds up a run's lines in the order in which they were written; `total` is all so far."""

    def __init__(self) -> None:
        self.total = Goodput()
        self._done: dict[tuple[int, int], float] = {}  # seconds of each step that counts, by stage and step
        self._stage, self._last, self._began = 0, 0.0, 0.0
        self._first: float | None = None
        self._process: float | None = None
        self._starting = False

    def add(self, line: Line) -> None:
        """Count one more line."""
        if isinstance(line, BeginLine):
            self._begin(line)
        elif self._starting:
            waited = line.data_s if isinstance(line, StepLine) else 0.0
            self.total.start_s += max(0.0, line.time - line.seconds - waited - self._began)
            self._starting = False
        if isinstance(line, StepLine):
            self._step(line)
        elif isinstance(line, StallLine):
            if line.step is not None:
                self._lose((self._stage, line.step))
            self.total.stalls_s[line.what] += line.seconds
        self._last = line.time
        self.total.wall_s = 0.0 if self._first is None else self._last - self._first

    def _begin(self, line: BeginLine) -> None:
        self._stage, self._starting = line.index, True
        self._lose((self._stage, line.step))
        self.total.starts += line.started != self._process
        self._process = line.started
        self.total.down_s += 0.0 if self._first is None else max(0.0, line.started - self._last)
        self._first = line.started if self._first is None else self._first
        self._began = max(line.started, self._last)

    def _step(self, line: StepLine) -> None:
        self.total.data_s += line.data_s
        if line.what == "step":
            self._done[self._stage, line.step] = line.seconds
            self.total.steps_s += line.seconds
        else:
            self.total.refused_s += line.seconds

    def _lose(self, place: tuple[int, int]) -> None:
        """The run goes back to the state at `place`: all steps after it are lost."""
        for step in [step for step in self._done if step > place]:
            self.total.lost_s += self._done.pop(step)
            self.total.lost_steps += 1


def read_goodput(folder: Path) -> Goodput | None:
    """The totals of the file in a run's output folder; none if there is no file."""
    return read_account(folder).total if (folder / FILE).exists() else None


def read_account(folder: Path) -> Account:
    """The account of the file in a run's output folder, to be gone on with; empty if there is no file."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Account()
    return _account(line for row in text.splitlines() if (line := parse_time_line(row)))


def add_up(lines: Iterable[Line]) -> Goodput:
    """The totals of a run's lines, in the order in which they were written."""
    return _account(lines).total


def _account(lines: Iterable[Line]) -> Account:
    account = Account()
    for line in lines:
        account.add(line)
    return account


def _opened(path: Path) -> TextIO:
    """The file, opened to append; a last line that was cut off gets its line end first."""
    file = path.open("a+", encoding="utf-8")
    if file.tell() > 0:
        with path.open("rb") as end:
            end.seek(-1, os.SEEK_END)
            if end.read(1) != b"\n":
                file.write("\n")
    return file


def parse_time_line(row: str) -> Line | None:
    """A line; none if it was cut off when the process died, or is of a kind that only a later version knows."""
    try:
        return _LINE.validate_json(row)
    except ValidationError:
        return None
