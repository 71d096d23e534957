"""The interface of what observes a rank, and the one place that tells all of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flm_megatron.errors import one_line, reason
from flm_megatron.url import redacted

if TYPE_CHECKING:
    from flm_megatron.training.metrics.events import Line
    from flm_megatron.training.metrics.goodput import Line as TimeLine


@dataclass(frozen=True)
class Span:
    """Something that took time: `what`, in the stage of this name, from `began` to `ended` (seconds since 1970)."""

    what: str
    stage: str
    began: float
    ended: float


class Observer:
    """Override what matters. It is called between steps, so it only takes notes."""

    def line(self, line: Line) -> None:
        """A line of `metrics.jsonl`; on the main rank alone."""

    def time(self, line: TimeLine) -> None:
        """A line as `goodput.jsonl` has them: where this rank's time went."""

    def span(self, span: Span) -> None:
        """Something before the first step of a stage: a load, a growth."""

    def close(self) -> None:
        """The rank has trained all it will."""


class Observers:
    """All observers of a rank; one that raises is left out from then on, with a line about it."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._all = list(observers)

    def __bool__(self) -> bool:
        """Whether anyone observes."""
        return bool(self._all)

    def line(self, line: Line) -> None:
        """Tell of a line of metrics."""
        self._tell(lambda observer: observer.line(line))

    def time(self, line: TimeLine) -> None:
        """Tell where time went."""
        self._tell(lambda observer: observer.time(line))

    @contextmanager
    def spanning(self, what: str, stage: str) -> Iterator[None]:
        """Tell of what the block does, when it has done it."""
        began = time.time()
        yield
        if self._all:
            span = Span(what, stage, began, time.time())
            self._tell(lambda observer: observer.span(span))

    def close(self) -> None:
        """Close all."""
        self._tell(lambda observer: observer.close())

    def _tell(self, told: Callable[[Observer], None]) -> None:
        for observer in tuple(self._all):
            try:
                told(observer)
            except Exception as error:
                self._all.remove(observer)
                warn(f"{type(observer).__name__}: {reason(error)}; the run goes on without it")


def warn(text: str) -> None:
    """A line about what does not work, on stderr."""
    print(f"WARNING: {redacted(one_line(text))}", file=sys.stderr, flush=True)
