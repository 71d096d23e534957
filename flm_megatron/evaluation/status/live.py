"""The view of a run, shown once or kept up to date on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live

from flm_megatron.evaluation.status.state import Reader, RunState
from flm_megatron.evaluation.status.view import status_view

EVERY_S = 1.0
"""Seconds between two looks at the folder."""
SAID_S = 60.0
"""Seconds between two plain lines where there is no terminal."""
ENDED = ("finished", "stopped", "killed")


def terminal(file: TextIO | None = None) -> Console:
    """A console on standard output, without colours for NO_COLOR, plain for `TERM=dumb` or what is no terminal."""
    return Console(file=file or sys.stdout, highlight=False, soft_wrap=False)


def is_live(console: Console) -> bool:
    """Whether the console can show a view that changes in place."""
    return console.is_terminal and not console.is_dumb_terminal


def show(folder: Path, console: Console) -> RunState:
    """Print the view once. Raises RequestError if the folder is no run's."""
    state = Reader(folder).read(settle=True)
    console.print(status_view(state, console))
    return state


def watch(folder: Path, console: Console, ended: Callable[[RunState], bool], every_s: float = EVERY_S) -> RunState:
    """Keep the view up to date until `ended` says so, or Ctrl-C; returns the last state.

    Where the console cannot change what it shows, a plain line is printed once a minute and for every new state.

    Raises:
        RequestError: the folder is no run's.
    """
    reader = Reader(folder)
    state = reader.read()
    if not is_live(console):
        return _say(reader, state, console, ended, every_s)
    with Live(status_view(state, console), console=console, auto_refresh=False, transient=False) as live:
        while True:
            last = ended(state)  # asked before the folder is read, so that the end is shown
            state = reader.read()
            live.update(status_view(state, console), refresh=True)
            if last:
                return state
            time.sleep(every_s)


def _say(
    reader: Reader, state: RunState, console: Console, ended: Callable[[RunState], bool], every_s: float
) -> RunState:
    said, at, last = "", -SAID_S, ended(state)
    while True:
        if state.state != said or time.monotonic() - at >= SAID_S:
            console.print(one_line(state), soft_wrap=True)
            said, at = state.state, time.monotonic()
        if last:
            return state
        time.sleep(every_s)
        last = ended(state)
        state = reader.read()


def one_line(state: RunState) -> str:
    """The state in one line."""
    step = state.progress.step
    if step is None:
        return f"{state.run.name}: {state.state}"
    steps = f"/{state.stage_steps}" if state.stage_steps is not None else ""
    return (
        f"{state.run.name}: {state.state}, {step.stage} step {step.step}{steps}, loss {step.loss:.4f}, "
        f"{step.tokens:,} of {state.total_tokens:,} tokens"
    )


def has_ended(state: RunState) -> bool:
    """Whether nothing more will come of the run unless it is started again."""
    return state.state in ENDED
