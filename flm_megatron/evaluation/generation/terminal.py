"""Lines from a terminal, also for processes without one: their parent reads for them."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path

ReadLine = Callable[[str], "str | None"]
"""Shows a prompt and returns the next line; none at the end of the input."""


def read_line(prompt: str) -> str | None:
    """The next line of this process's standard input; the prompt is shown on a terminal only."""
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


@contextmanager
def relayed_lines() -> Iterator[str]:
    """While the block runs, answer the process that connects to the address given here with lines of our input."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "lines")
        with Listener(address, "AF_UNIX") as listener:
            threading.Thread(target=_relay, args=(listener,), daemon=True).start()
            yield address


def _relay(listener: Listener) -> None:
    try:
        with listener.accept() as connection:
            while True:
                connection.send(read_line(connection.recv()))
    except (EOFError, OSError):  # the reader is gone, or the block ended
        return


@contextmanager
def line_reader(address: str | None) -> Iterator[ReadLine]:
    """Read from the process that relays at `address`, or from our own input without one."""
    if address is None:
        yield read_line
        return
    with Client(address, "AF_UNIX") as connection:

        def ask(prompt: str) -> str | None:
            """Request a line from the other side."""
            connection.send(prompt)
            return connection.recv()

        yield ask
