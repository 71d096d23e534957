"""Streams and events of a CPU, which does its work in the order that it is asked for: there is nothing to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Event:
    """A point in a stream, which has passed."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        """As torch.cuda.Event's; a time between two events is nobody's."""

    def record(self, stream: Stream | None = None) -> None:
        """The point is now."""

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
        """As torch.cuda.Stream's."""

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
    """Runs its block, in whatever stream."""
    yield


def install() -> None:
    """Put them in the places of CUDA's."""
    for answer in (Event, Stream, current_stream, default_stream, stream):
        setattr(torch.cuda, answer.__name__, answer)
