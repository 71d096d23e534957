"""The base class of trackers, and what they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flm_megatron.config.schema import TrackerConfig
from flm_megatron.json_text import JsonObject

Status = Literal["finished", "stopped", "failed", "killed"]
"""How a run ended: at the end of its budget, by a signal after saving, by an error, or without a word."""


@dataclass(frozen=True)
class Point:
    """Numbers by name at `step`, which counts the steps of all stages.

    `time` (seconds since 1970) is when they were first sent, or tried to be: whatever happened to the run and to the
    tracker since then, it stays, so that numbers of the same name, step and time are the same ones sent again.
    """

    step: int
    values: Mapping[str, float]
    time: float = 0.0


@dataclass(frozen=True)
class Event:
    """Something that is no number: what (`stage`, `growth`, `save`, ...), where, a line of text, and its details.

    `step` counts the steps of all stages, `tokens` those of the run.
    """

    what: str
    stage: str
    step: int
    tokens: int
    text: str
    details: JsonObject

    def to_json(self) -> JsonObject:
        """Everything, in order."""
        place = {"what": self.what, "stage": self.stage, "step": self.step, "tokens": self.tokens}
        return place | {"text": self.text} | self.details


@dataclass(frozen=True)
class TrackedRun:
    """The run that is tracked: its name, the resolved run file without secrets, a folder for the tracker's files, a
    file with every event so far (a line of JSON each), the tracker's options, and the id that `start` gave when the run
    was first tracked, if it was."""

    name: str
    config: JsonObject
    folder: Path
    events: Path
    options: TrackerConfig
    id: str | None


class Tracker:
    """A class of its own for each place that runs are reported to: override all four moments.

    It is made without arguments, in a process of its own beside the first rank's, and may take its time. What it raises
    is reported once and tried again later, with the same values.
    """

    where: str = ""
    """Where the run is found, for people; said after `start`."""

    def start(self, run: TrackedRun) -> str:
        """Begin the run, or go on with the one of `run.id`; returns the id to go on with."""
        raise NotImplementedError

    def points(self, points: Sequence[Point]) -> None:
        """Send numbers; steps never go back. None is given twice, unless it is not known whether it has arrived."""
        raise NotImplementedError

    def event(self, event: Event) -> None:
        """Send an event."""

    def finish(self, status: Status) -> None:
        """Send what is left; the run has ended, perhaps to go on another day."""
