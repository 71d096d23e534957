"""Streams and events for a CPU, which does all work in order: there is never anything to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Event:
    """A point in a stream, which has passed."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        """Like torch.cuda.Event's; times between events are not measured."""

    def record(self, stream: Stream | None = None) -> None:
        """Mark the present."""

    def wait(self, stream: Stream | None = None) -> None:
        """Returns at once."""

    def query(self) -> bool:
        """True: all work before it is done."""
        return True

    def synchronize(self) -> None:
        """Returns at once."""


class Stream:
    """The one queue of a CPU, which is always empty."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        """Like torch.cuda.Stream's."""

    def wait_event(self, event: Event) -> None:
        """Returns at once."""

    def wait_stream(self, stream: Stream) -> None:
        """Returns at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """A point that has passed."""
        return event or Event()

    def query(self) -> bool:
        """True: all work is done."""
        return True

    def synchronize(self) -> None:
        """Returns at once."""


_only = Stream()


def current_stream(device: object = None) -> Stream:
    """The only one."""
    return _only


def default_stream(device: object = None) -> Stream:
    """The only one."""
    return _only


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Run the block, whatever the stream."""
    yield


def install() -> None:
    """Install them in place of CUDA's."""
    for answer in (Event, Stream, current_stream, default_stream, stream):
        setattr(torch.cuda, answer.__name__, answer)
