"""SIGTERM and SIGINT request a stop: at once before training, afterwards after the step, with a checkpoint saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flm_megatron.distributed.error_file import write_error_file

STOPPED = 3
SIGNALS = (signal.SIGTERM, signal.SIGINT)
UNWIND_S = 3.0
"""Seconds that a process may take to unwind while it waits inside a library, where Python cannot hear signals."""

_told = threading.Event()
_end: tuple[int, str] | None = None
"""Status and last words of a process that has finished training."""


def told_to_stop() -> bool:
    """Whether SIGTERM or SIGINT came within `stop_before_training`, even if the main thread cannot hear it yet."""
    return _told.is_set()


def training_ended(status: int, last_words: str = "") -> None:
    """Note that training is over and this process will end with `status`, within `stop_before_training`.

    A signal from then on changes neither that status nor the `last_words`.
    """
    global _end
    _end = status, last_words


class StoppedBeforeTraining(SystemExit):
    """A signal came before the first step: the process leaves what it was making and ends with status 3."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class StopRequest:
    """Whether a signal has requested a stop of this process."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Note that a signal requested a stop."""
        self.asked = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGINT set the request instead of ending the process."""
    request = StopRequest()
    with handling(request.ask):
        yield request


@contextmanager
def stop_before_training(last_words: str = "") -> Iterator[None]:
    """Within the block SIGTERM and SIGINT end the process with status 3, except inside `stop_on_signal`.

    Open contexts are left in order (StoppedBeforeTraining is raised in the main thread), unless that takes longer than
    UNWIND_S inside a library: then the process ends at once. `last_words` go to a launcher.
    """
    guard = _Guard(last_words)
    with handling(guard.stop):
        guard.start()
        try:
            yield
        finally:
            guard.end()


class _Guard:
    """A thread that hears signals through Python's wakeup descriptor even if the main thread is stuck."""

    def __init__(self, last_words: str) -> None:
        self.last_words = last_words
        self.asked = False
        self.over = threading.Event()
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.before = -1

    def start(self) -> None:
        """Start listening. In the main thread only."""
        global _end
        _end = None
        _told.clear()
        self.before = signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def end(self) -> None:
        """Stop listening."""
        self.over.set()
        signal.set_wakeup_fd(self.before)
        os.close(self.write)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal unwinds the main thread, later ones do not disturb that."""
        if not self.asked and _end is None:
            self.asked = True
            write_error_file(self.last_words, STOPPED)
            raise StoppedBeforeTraining

    def _listen(self) -> None:
        while heard := os.read(self.read, 1):
            if heard[0] in SIGNALS:
                _told.set()
            # Someone else may handle it by now: training, which stops after its step.
            if heard[0] in SIGNALS and signal.getsignal(heard[0]) == self.stop and not self.over.wait(UNWIND_S):
                status, words = _end or (STOPPED, self.last_words)
                if words:
                    write_error_file(words, status)
                os._exit(status)
        os.close(self.read)


@contextmanager
def handling(handler: object) -> Iterator[None]:
    """During the block `handler` is called for SIGTERM and SIGINT."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
