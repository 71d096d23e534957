"""Starts the processes of a run's trackers beside its first rank, hears what they say, and ends them in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from flm_megatron.config.loader import load_run
from flm_megatron.config.overrides import Overrides
from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig, TrackerConfig
from flm_megatron.errors import RequestError, refuse_together
from flm_megatron.training.metrics.events import FILE, StepEvent, read_events
from flm_megatron.training.trackers.names import require_tracker
from flm_megatron.training.trackers.process import RUN_FILE
from flm_megatron.training.trackers.tracker import Status

PROCESS = "flm_megatron.training.trackers.process"
KILLED_S = 5.0
"""Seconds that a process which was killed is waited for."""
LONGEST_S = 86400
"""Seconds for a run that is sent when it is over."""
SAID = 1
"""Exit status of a process that has said why."""
LATER = "what is not sent yet is sent when the run goes on, or by `flm track`"


class Tracking:
    """The run's trackers, each in its process; `status` is how the run ended, as far as is known."""

    def __init__(self, run: RunConfig) -> None:
        self.status: Status = "failed"
        say = partial(_say, Path(run.output) / "log.txt")
        self._processes = [TrackerProcess(run.output, tracker, say) for tracker in run.logging.trackers]

    def end(self) -> bool:
        """Tell all trackers how the run ended and wait for each as long as it may take; whether all sent everything."""
        for process in self._processes:
            process.tell(self.status)
        began = time.monotonic()
        sent = [process.ended(began) for process in self._processes]
        return all(sent)


class TrackerProcess:
    """A tracker's process, in a session of its own, and the thread that passes on what it says."""

    def __init__(self, output: str, tracker: TrackerConfig, say: Callable[[str], None]) -> None:
        self.tracker, self.say = tracker, say
        self.process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, output, json.dumps(asdict(tracker))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.told, self.said = False, False
        self.listener = threading.Thread(target=self._listen, name=f"tracker {self.tracker.name}", daemon=True)
        self.listener.start()

    def tell(self, status: Status) -> None:
        """Say how the run ended."""
        self.told = True
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended before
            self.process.stdin.write(f"{status}\n".encode())
            self.process.stdin.flush()

    def ended(self, began: float) -> bool:
        """Wait until it has ended, or its time after `began` is over; returns whether it sent everything."""
        limit_s = self.tracker.exit_wait_s
        try:
            self.process.wait(max(0.0, began + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.say(f"WARNING: {self.tracker.name} has not ended within {limit_s} s and is ended: {LATER}")
        else:
            self._say_status()
        with suppress(ProcessLookupError):  # also what a library started
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a system call that does not come back, such as of a lost disk
            self.process.wait(KILLED_S)
        self.listener.join(1.0)
        return self.process.returncode == 0

    def _say_status(self) -> None:
        """Say that it has ended otherwise than it should, unless it said so itself."""
        status = self.process.wait()
        if status not in (0, SAID) and not self.said:
            self.said = True
            self.say(f"WARNING: {self.tracker.name} ended with status {status}, the run goes on without it: {LATER}")

    def _listen(self) -> None:
        """Pass on its lines; say so when it ends while the run goes on."""
        assert self.process.stdout is not None
        for row in self.process.stdout:
            self.say(row.decode("utf-8", "replace").rstrip("\n"))
        if not self.told:
            self._say_status()


@contextmanager
def tracked(run: RunConfig) -> Iterator[Tracking | None]:
    """Track the run during the block: on its first process, if it has trackers."""
    if not run.logging.trackers or os.environ.get("RANK", "0") != "0":
        yield None
        return
    try:
        tracking = Tracking(run)
    except OSError as error:  # no memory, no processes
        _say(Path(run.output) / "log.txt", f"WARNING: the run is not tracked: {error}")
        yield None
        return
    try:
        yield tracking
    finally:
        tracking.end()


def track(folder: Path, overrides: Overrides = (), follow: bool = False) -> bool:
    """Send what is not sent yet of a run to its trackers, or to those that `overrides` of its run file name.

    With `follow` it goes on, as the run does, until SIGINT. Returns whether everything was sent.

    Raises:
        RequestError: there is no run, it has no tracker, or one that cannot be used.
    """
    if not (folder / FILE).is_file():
        raise RequestError(f"{folder} has no {FILE}: give the output folder of a run")
    run = load_run(folder / RUN_FILE, overrides)
    if not run.logging.trackers:
        raise RequestError(f"the run in {folder} has no trackers: name some, as in --logging.trackers '[mlflow]'")
    check(run)
    refuse_together(partial(require_tracker, tracker.name) for tracker in run.logging.trackers)
    trackers = [replace(tracker, exit_wait_s=LONGEST_S) for tracker in run.logging.trackers]
    run = replace(run, output=str(folder), logging=replace(run.logging, trackers=trackers))
    tracking = Tracking(run)
    with suppress(KeyboardInterrupt):
        while follow:
            time.sleep(1)
    tracking.status = "finished" if _is_finished(run) else "stopped"
    return tracking.end()


def _is_finished(run: RunConfig) -> bool:
    """Whether nothing is left of the last stage."""
    steps = read_events(Path(run.output), StepEvent)
    return bool(steps) and steps[-1].stage == run.stages[-1].name and steps[-1].eta_s == 0


def _say(log: Path, line: str) -> None:
    """Print a line, and add it to the run's log, as far as they can be written."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        print(line, file=file)
