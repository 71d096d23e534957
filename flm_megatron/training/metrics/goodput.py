"""Where a run's wall time went: steps that count, lost steps, stalls, starts, and time without a process.

The main rank adds a line to `goodput.jsonl` for every step and stall. Unlike `metrics.jsonl` the file is never
truncated, so it keeps what was trained and lost.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import psutil
from pydantic import TypeAdapter, ValidationError

from flm_megatron.training.metrics.log import duration

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
    """Writes the file in `folder`; does nothing without one, as on all ranks but the main one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
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


def read_goodput(folder: Path) -> Goodput | None:
    """The totals of the file in a run's output folder; none if there is no file."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return add_up(line for row in text.splitlines() if (line := _parsed(row)))


def add_up(lines: Iterator[Line]) -> Goodput:
    """The totals of a run's lines, in the order in which they were written."""
    total = Goodput()
    done: dict[tuple[int, int], float] = {}  # seconds of each step that counts, by stage and step
    stage, first, last, began, starting, process = 0, None, 0.0, 0.0, False, None
    for line in lines:
        if isinstance(line, BeginLine):
            stage, starting = line.index, True
            _lose(total, done, (stage, line.step))
            total.starts += line.started != process
            process = line.started
            total.down_s += 0.0 if first is None else max(0.0, line.started - last)
            first = line.started if first is None else first
            began = max(line.started, last)
        elif starting:
            waited = line.data_s if isinstance(line, StepLine) else 0.0
            total.start_s += max(0.0, line.time - line.seconds - waited - began)
            starting = False
        if isinstance(line, StepLine):
            total.data_s += line.data_s
            if line.what == "step":
                done[stage, line.step] = line.seconds
                total.steps_s += line.seconds
            else:
                total.refused_s += line.seconds
        elif isinstance(line, StallLine):
            if line.step is not None:
                _lose(total, done, (stage, line.step))
            total.stalls_s[line.what] += line.seconds
        last = line.time
    total.wall_s = 0.0 if first is None else last - first
    return total


def _lose(total: Goodput, done: dict[tuple[int, int], float], place: tuple[int, int]) -> None:
    """The run goes back to the state at `place`: all steps after it are lost."""
    for step in [step for step in done if step > place]:
        total.lost_s += done.pop(step)
        total.lost_steps += 1


def _opened(path: Path) -> TextIO:
    """The file, opened to append; a last line that was cut off gets its line end first."""
    file = path.open("a+", encoding="utf-8")
    if file.tell() > 0:
        with path.open("rb") as end:
            end.seek(-1, os.SEEK_END)
            if end.read(1) != b"\n":
                file.write("\n")
    return file


def _parsed(row: str) -> Line | None:
    """A line; none if it was cut off when the process died, or is of a kind that only a later version knows."""
    try:
        return _LINE.validate_json(row)
    except ValidationError:
        return None
