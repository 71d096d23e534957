"""The process of one tracker: `python -m flm_megatron.training.trackers.process OUTPUT OPTIONS`.

`launch.tracking` starts it. It reads the run's own files, so that whatever happens here, and how long it takes, cannot
reach the run; what could not be sent is sent by the next start. Its output is lines for people, its input a word on how
the run ended; the end of the input without one means that the run was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TextIO, TypeVar, cast

from flm_megatron.config.loader import load_run, run_to_dict
from flm_megatron.config.schema import TrackerConfig
from flm_megatron.errors import one_line, reason
from flm_megatron.json_text import Json
from flm_megatron.training.metrics.events import FILE, parse_line
from flm_megatron.training.trackers.lines import Reading, Tail, kind_of
from flm_megatron.training.trackers.names import load_tracker
from flm_megatron.training.trackers.state import EVENTS, read_sent, sending, tracker_folder
from flm_megatron.training.trackers.streams import private_streams
from flm_megatron.training.trackers.tracker import Event, Point, Status, TrackedRun
from flm_megatron.url import redacted

RUN_FILE = "run.yaml"
POLL_S = 1.0
LONGEST_PAUSE_S = 60.0
"""Seconds between two looks at the file, and at most between two attempts to send."""
GRACE_S = 5
"""Seconds after its limit, at which the run has ended it."""
ORPHAN_S = 30
"""Seconds that it lives on when the run was killed."""
QUIET_S = 600.0
"""Seconds after a warning in which no other is said: a tracker that fails now and then does not fill the log."""
MOST_SAID = 2000
"""Letters of a line."""
T = TypeVar("T")


class Ending:
    """Waits in a thread for the word on how the run ended; from then on the process has a time limit."""

    def __init__(self, words: BinaryIO, limit_s: int) -> None:
        self.words, self.limit_s = words, limit_s
        self.status: Status | None = None
        self.come = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        word = self.words.readline().decode().strip()
        self.status = cast(Status, word) if word else "killed"
        signal.alarm(self.limit_s + GRACE_S if word else ORPHAN_S)  # ends the process whatever it hangs in
        self.come.set()


class GaveUp(Exception):
    """The run is over, and the last attempt failed."""


class Sender:
    """Sends what is new in a run's metrics until the run has ended."""

    def __init__(self, output: Path, options: TrackerConfig, ending: Ending, say: Callable[[str], None]) -> None:
        self.options, self.ending, self.say = options, ending, say
        self.config = load_run(output / RUN_FILE)
        self.folder = tracker_folder(output, options.name)
        self.sent = read_sent(self.folder)
        events = self.folder / EVENTS
        self.written = set(events.read_text(encoding="utf-8").splitlines()) if events.exists() else set()
        self.tail, self.reading = Tail(output / FILE), Reading(self.config)
        self.troubled, self.quiet_until = False, 0.0
        self.tracker = load_tracker(options.name)()

    def run(self) -> None:
        """Begin, send while the run lasts, and end."""
        options = self.options
        known = TrackedRun(
            self.config.name,
            _without_secrets(run_to_dict(self.config)),
            Path(options.folder) if options.folder else self.folder,
            self.folder / EVENTS,
            options,
            self.sent.id,
        )
        self.sent.id = self._tried(lambda: self.tracker.start(known))
        self._tried(lambda: self.sent.save(self.folder))
        self.say(f"{options.name}: {self.tracker.where or self.sent.id}")
        over = False
        while not over:
            over = self.ending.come.wait(POLL_S)
            while self._send_some():
                pass
        status = self.ending.status or "killed"
        self._tried(lambda: self.tracker.finish(status))

    def _send_some(self) -> bool:
        """Send about a megabyte of lines; returns whether there were any."""
        replaced, rows = self.tail.read()
        if replaced:
            self.reading = Reading(self.config)
        new = list(self._unsent(rows))
        points = [(kind, item) for kind, item in new if isinstance(item, Point)]
        if points:
            self._send_points(points)
        for kind, event in new:
            if isinstance(event, Event):
                self._send_event(kind, event)
        return bool(rows)

    def _send_points(self, points: list[tuple[str, Point]]) -> None:
        """Send numbers with the time of their first attempt, which is noted before: they may have to be sent again."""
        tried = [(kind, point) for kind, point in points if self.sent.was_tried(kind, point)]
        for batch in (tried, points[len(tried) :]):  # lines are in order, so that what was tried comes first
            if batch:
                timed = self.sent.begin(batch, time.time())
                self._tried(lambda: self.sent.save(self.folder))
                self._tried(partial(self.tracker.points, timed))
                self._note(batch)

    def _send_event(self, kind: str, event: Event) -> None:
        self._tried(lambda: self._write_event(event))
        self._tried(lambda: self.tracker.event(event))
        self._note([(kind, event)])

    def _write_event(self, event: Event) -> None:
        """Add it to the file of events, once."""
        if (line := json.dumps(event.to_json())) not in self.written:
            with (self.folder / EVENTS).open("a", encoding="utf-8") as file:
                print(line, file=file)
            self.written.add(line)

    def _unsent(self, rows: list[str]) -> Iterator[tuple[str, Point | Event]]:
        """Points and events of lines, each with the kind of its line, without those that were sent."""
        steps = dict(self.sent.steps)
        for line in (line for row in rows if (line := parse_line(row))):
            kind = kind_of(line)
            for item in self.reading.items(line):
                if isinstance(item, Point) and item.step <= steps.get(kind, -1):
                    continue
                if isinstance(item, Point):
                    steps[kind] = item.step
                elif self.sent.has(item):
                    continue
                yield kind, item

    def _note(self, items: list[tuple[str, Point]] | list[tuple[str, Event]]) -> None:
        """Note what was sent; nothing more is sent until that is on the disk, or it would be sent again some day."""
        for kind, item in items:
            self.sent.add(kind, item)
        self._tried(lambda: self.sent.save(self.folder))

    def _tried(self, work: Callable[[], T]) -> T:
        """Do `work` until it succeeds, with pauses; the first failure is said. Raises GaveUp once the run has ended."""
        pause = POLL_S
        while True:
            over = self.ending.come.is_set()
            try:
                done = work()
            except (Exception, SystemExit) as error:
                if over:
                    raise GaveUp(_said(error)) from None
                if not self.troubled and time.monotonic() >= self.quiet_until:
                    self.say(f"WARNING: {self.options.name}: {_said(error)}; it is tried again, the run goes on")
                    self.troubled, self.quiet_until = True, time.monotonic() + QUIET_S
                self.ending.come.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if self.troubled:
                self.say(f"{self.options.name}: works again")
                self.troubled = False
            return done


def main(folder: str, options: str) -> int:
    """Track the run in an output folder as `options` (JSON) say; returns 1 if something could not be sent."""
    words, lines = private_streams()
    say = _speaker(lines)
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the run, whose end is told
        signal.signal(number, _ignore)
    os.nice(10)
    _be_ended_first()
    output, tracker = Path(folder), TrackerConfig(**json.loads(options))
    ending = Ending(words, tracker.exit_wait_s)
    try:
        with sending(tracker_folder(output, tracker.name)):
            Sender(output, tracker, ending, say).run()
    except (Exception, SystemExit) as error:
        said = str(error) if isinstance(error, GaveUp) else _said(error)
        say(f"WARNING: {tracker.name}: {said}; what is not sent yet is sent when the run goes on, or by `flm track`")
        return 1
    return 0


def _be_ended_first() -> None:
    """Where memory runs out, the system ends this process and what it starts, not the one that trains."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _speaker(lines: TextIO) -> Callable[[str], None]:
    def say(text: str) -> None:
        """A line without secrets; nobody listens any more when the run is gone."""
        with suppress(OSError):
            print(redacted(one_line(text[:MOST_SAID])), file=lines, flush=True)

    return say


def _without_secrets(value: Json) -> Json:
    """JSON with every text in it redacted."""
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def _said(error: BaseException) -> str:
    return reason(error) if isinstance(error, Exception) else f"it ended with status {error}"


def _ignore(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which processes of a library would inherit."""


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    os._exit(status)  # threads that a library left do not hold it
