"""What of a run was sent to a tracker, so that nothing is sent twice when the run goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.json_text import parse_json
from flm_megatron.training.trackers.tracker import Event, Point

FOLDER = "trackers"
"""Below a run's output folder."""
FILE, LOCK, EVENTS = "sent.json", ".lock", "events.jsonl"
FORMAT, READ = 2, (1, 2)
"""What is written, and what is read: the first has no attempt."""


def tracker_folder(output: Path, name: str) -> Path:
    """Where a run keeps what belongs to one of its trackers."""
    return output / FOLDER / re.sub(r"[^\w.-]", "_", name)


@dataclass
class Sent:
    """The run's id at the tracker, the last step that was sent of every kind of line, and which events were.

    `attempt` has what is being sent: the last step of every kind, and since when (seconds since 1970).
    """

    format: int = FORMAT
    id: str | None = None
    steps: dict[str, int] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    attempt: dict[str, tuple[int, float]] = field(default_factory=dict)

    def has(self, event: Event) -> bool:
        """Whether an event was sent before."""
        return event_key(event) in self.events

    def was_tried(self, kind: str, point: Point) -> bool:
        """Whether an earlier attempt may have sent it."""
        return kind in self.attempt and point.step <= self.attempt[kind][0]

    def begin(self, points: Sequence[tuple[str, Point]], now: float) -> list[Point]:
        """Note an attempt to send points, all of which were tried before or none; returns them with its first time."""
        timed = []
        for kind, point in points:
            if not self.was_tried(kind, point):
                self.attempt[kind] = (point.step, now)
            timed.append(replace(point, time=self.attempt[kind][1]))
        return timed

    def add(self, kind: str, item: Point | Event) -> None:
        """Note that it was sent."""
        if isinstance(item, Event):
            self.events.append(event_key(item))
        else:
            self.steps[kind] = item.step
            if item.step >= self.attempt.get(kind, (-1, 0.0))[0]:
                self.attempt.pop(kind, None)

    def save(self, folder: Path) -> None:
        """Write it, as a whole or not at all; a power cut may lose it, and then what it knew is sent again."""
        partial = folder / f".{FILE}.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(folder / FILE)


def read_sent(folder: Path) -> Sent:
    """What is noted in a tracker's folder; nothing if there is no note.

    Raises:
        RequestError: the note is damaged, or of a later version.
    """
    path = folder / FILE
    if not path.exists():
        return Sent()
    values = parse_json(path.read_text(encoding="utf-8"), str(path))
    try:
        sent = Sent(**values)
    except TypeError:
        raise RequestError(
            f"{path} is not what this program writes there: move it away, to track the run anew"
        ) from None
    if sent.format not in READ:
        raise RequestError(
            f"{path} has format {sent.format}, this version reads {FORMAT}: use the version that wrote it"
        )
    sent.format = FORMAT
    return sent


def event_key(event: Event) -> str:
    """What tells an event from all others of the run."""
    text = json.dumps([event.what, event.stage, event.step, event.text])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@contextmanager
def sending(folder: Path) -> Iterator[None]:
    """Wait until no other process sends from this folder, which is created; none does while the block lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
