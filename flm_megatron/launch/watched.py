"""`flm train --watch`: the run in a process of its own, and its view in this one, so that neither holds the other up.

What the run prints stands above the view, but for its lines of steps, which the view shows; `log.txt` has them all.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from rich.console import Console
from rich.text import Text

from flm_megatron.errors import FlmError, RequestError
from flm_megatron.evaluation.status.live import is_live, terminal, watch

OF_A_STEP = re.compile(r"\S+ step \d+/\d+ \| tokens ")
LOOK_S = 0.2


def require_watch(branch: str | None) -> None:
    """Check that a run can be watched from here. Raises RequestError under a launcher and for a branch."""
    from flm_megatron.distributed.world import launched

    if launched():
        raise RequestError("--watch is for a run without a launcher: see this one with `flm status OUTPUT --watch`")
    if branch is not None:
        raise RequestError("--watch shows the run itself: see a branch with `flm status OUTPUT/branches/NAME --watch`")


def train_watched(arguments: Sequence[str], folder: Path) -> int | None:
    """`flm train` with `arguments` in a process of its own, its output folder shown here; returns its exit status.

    None, and nothing is started, where standard output is no terminal that can show a view.
    """
    console = terminal()
    if not is_live(console):
        return None
    command = [sys.executable, "-m", "flm_megatron.cli.main", "train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=_hand_on, args=(process.stdout, console), daemon=True)
        with _passing_signals(process):
            reader.start()
            _view(process, folder, console)
            status = process.wait()
        reader.join()
    return status if status >= 0 else 128 - status


def _view(process: subprocess.Popen[bytes], folder: Path, console: Console) -> None:
    """Show the run until its process ends, from when its folder has a run file that this start has written."""
    began = time.time()
    while process.poll() is None and not _is_new(folder / "run.yaml", began):
        time.sleep(LOOK_S)
    if process.poll() is None:
        try:
            watch(folder, console, lambda _: process.poll() is not None)
        except FlmError as error:
            console.print(Text(f"WARNING: the run goes on without its view: {error}"))


def _is_new(path: Path, began: float) -> bool:
    """Whether a file was written since `began`, to a second: dates of files are not finer everywhere."""
    try:
        return path.stat().st_mtime >= began - 1
    except OSError:
        return False


def _hand_on(lines: IO[bytes], console: Console) -> None:
    """Print what the run prints above the view, but for lines of steps."""
    for row in lines:
        line = row.decode("utf-8", "replace").rstrip()
        if not OF_A_STEP.match(line):
            console.print(Text(line), soft_wrap=True)


@contextmanager
def _passing_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM goes on to the run; SIGINT reaches it from the terminal, and both leave this process to wait for it."""

    def hear(number: int, frame: FrameType | None) -> None:
        """Pass on what came to this process alone."""
        if number == signal.SIGTERM:
            process.send_signal(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
