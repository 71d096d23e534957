"""A tracked run without a training: its files as a run writes them, and trackers of a user that go wrong."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flm_megatron.config.loader import dump_run
from flm_megatron.config.schema import GrowthConfig, ModelConfig, RunConfig, StageConfig, TrackerConfig
from flm_megatron.growth.record import Certificate, Comparison
from flm_megatron.launch.tracking import tracked
from flm_megatron.training.metrics.events import (
    FILE,
    GrowthEvent,
    Line,
    SaveEvent,
    StepEvent,
    ValidationEvent,
    line_text,
)
from flm_megatron.training.trackers import Event, Point, Status, TrackedRun, Tracker

SAID = "said.jsonl"
PLACES = ("start", "point", "event", "finish")
SMALL = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=500)
CERTIFICATE = Certificate("large", True, 4, 32, (Comparison("fp32", 2e-6, 1e-6, 2.0, 3.0, 3.5),))
LARGE = replace(SMALL, num_layers=4)


class Recording(Tracker):
    """Writes what it is told to a file of its folder; at `place` it goes wrong."""

    place = ""

    def start(self, run: TrackedRun) -> str:
        """Remember the run."""
        self.run = run
        self.where = "a file"
        self.say("start", run.id)
        return "the id"

    def points(self, points: Sequence[Point]) -> None:
        """Write each."""
        for point in points:
            self.say("point", [point.step, dict(point.values)])

    def event(self, event: Event) -> None:
        """Write it."""
        self.say("event", event.to_json())

    def finish(self, status: Status) -> None:
        """Write how it ended."""
        self.say("finish", status)

    def say(self, what: str, value: object) -> None:
        """Add a line, unless this is where it goes wrong."""
        if self.place == what:
            self.go_wrong()
        with (self.run.folder / SAID).open("a") as file:
            print(json.dumps([what, value]), file=file)

    def go_wrong(self) -> None:
        """What happens in the wrong place."""


class Hanging(Recording):
    """Never comes back."""

    def go_wrong(self) -> None:
        """Hang, deaf to what can be caught."""
        while True:
            time.sleep(3600)


class Raising(Recording):
    """Raises, with a secret in the message."""

    def go_wrong(self) -> None:
        """Raise."""
        raise ConnectionError("https://user:hunter2@host is away\nfor long")


class Exiting(Recording):
    """Ends its process."""

    def go_wrong(self) -> None:
        """Die."""
        os._exit(7)


def going_wrong(kind: type[Recording]) -> list[str]:
    """Names of classes of a kind, one for each place, as a run file would give them."""
    for place in PLACES:
        name = f"{kind.__name__}_{place}"
        globals()[name] = type(name, (kind,), {"place": place})
    return [f"{__name__}.{kind.__name__}_{place}" for place in PLACES]


WRONG = {kind.__name__: going_wrong(kind) for kind in (Hanging, Raising, Exiting)}


class Flaky(Recording):
    """Fails the first time that it is given points."""

    failed = False

    def points(self, points: Sequence[Point]) -> None:
        """Raise once."""
        if not self.failed:
            self.failed = True
            raise TimeoutError("slow")
        super().points(points)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        number: int = any_port.getsockname()[1]
        return number


def tracked_run(output: Path, *trackers: TrackerConfig) -> RunConfig:
    """A run of two stages whose run file is in `output`, where processes of trackers look for it."""
    stages = [
        StageConfig(name="small", model=SMALL, tokens=512),
        StageConfig(name="large", model=LARGE, tokens=512, growth=GrowthConfig()),
    ]
    run = RunConfig(name="a run", output=str(output), stages=stages)
    run.logging.trackers = list(trackers)
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.yaml").write_text(dump_run(run))
    return run


def steps(stage: str, numbers: Iterable[int], tokens: int = 0) -> list[Line]:
    """Step lines whose loss tells the step."""
    return [StepEvent(stage, n, tokens + 128 * n, 10 - n, 0.5, 1e-3, 0.1, 1e3, 0.2, None, 1.5, 9.0) for n in numbers]


def two_stages() -> list[Line]:
    """Lines of a run that grows after four steps."""
    first = [*steps("small", range(1, 5)), ValidationEvent("small", 4, 512, 6.5, {"held out": 6.5})]
    grown: list[Line] = [
        SaveEvent("small", 4, 512, "checkpoints/small/step_00000004"),
        GrowthEvent("large", 0, 512, None),
    ]
    return [*first, *grown, *steps("large", range(1, 4), 512)]


def write_lines(output: Path, lines: Iterable[Line]) -> None:
    """Write the run's metrics anew, as a start of the run does."""
    partial = output / ".partial"
    partial.write_text("".join(line_text(line) + "\n" for line in lines))
    partial.replace(output / FILE)


def track(run: RunConfig, status: Status = "finished") -> None:
    """Track a run that has ended."""
    with tracked(run) as tracking:
        assert tracking
        tracking.status = status


def said(output: Path, what: str) -> list[Any]:
    """What a `Recording` tracker wrote of a kind."""
    found = [json.loads(row) for path in output.rglob(SAID) for row in path.read_text().splitlines()]
    return [value for kind, value in found if kind == what]
