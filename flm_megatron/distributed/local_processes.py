"""Starts a world of processes on this machine, without torchrun."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from flm_megatron.distributed.signals import (
    STOPPED,
    StoppedBeforeTraining,
    handling,
    stop_before_training,
    training_ended,
)
from flm_megatron.errors import ERRORS, FlmError, Mistakes, ProgramError, RequestError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from torch.multiprocessing.spawn import ProcessException

MOST_PROCESSES, PROCESSES_PER_CORE = 64, 8
"""Processes of one machine: for a layout tried out on few cores, and for one that uses them."""
GRACE_S = 5.0
RESEND_S = 1.0
QUIET_TRACKER = "ignore:resource_tracker"
"""After a rank was killed Python's resource tracker says that it cleans up; that must not hide who was killed."""


def require_processes(size: int, what: str) -> None:
    """Check that this machine can be asked to start `size` processes. Raises RequestError, naming `what` needs them."""
    most = max(MOST_PROCESSES, PROCESSES_PER_CORE * (os.cpu_count() or 1))
    if size > most:
        raise RequestError(
            f"{what} needs {size:,} processes, and this machine is good for {most}: start it on a cluster (`flm "
            "launch`, torchrun), or give it a smaller layout"
        )


@dataclass(frozen=True)
class _World:
    """What a started process needs to join the others."""

    size: int
    folder: str
    timeout_s: int


def run_processes(size: int, function: Callable[..., int], args: tuple[object, ...], timeout_s: int = 600) -> int:
    """Run `function(*args) -> exit status` on `size` processes of this machine that share one world.

    `function` and `args` are pickled. Signals to this process are passed on. Returns rank 0's status, or 3 where a
    signal stopped a rank before it had begun.

    Raises:
        FlmError: a rank failed or was killed; the message names it and its error, the others are ended.
    """
    import torch.multiprocessing as multiprocessing
    from torch.multiprocessing.spawn import ProcessException

    require_processes(size, "this layout")
    # It says of every rank that it ends the others; who failed, and of what, is said once, below.
    logging.getLogger(ProcessException.__module__).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, _passing_signals() as passing:
        processes = multiprocessing.start_processes(
            _process_main,
            args=(_World(size, folder, timeout_s), function, args),
            nprocs=size,
            join=False,
            start_method=_start_method(),
        )
        passing.to(processes.processes)
        try:
            while not processes.join(timeout=RESEND_S, grace_period=GRACE_S):
                passing.again()
        except ProcessException as error:
            if _stopped_early(processes.processes, error, passing.asked):
                return STOPPED
            raise _first_error(Path(folder), error) from None
        return int((Path(folder) / "status").read_text())


def _start_method() -> str:
    """Fork from a server that has imported torch once; with CUDA, which does not survive a fork, spawn."""
    import multiprocessing

    from flm_megatron.device import current

    if QUIET_TRACKER not in sys.warnoptions:  # which Python hands on to its helper processes
        sys.warnoptions.append(QUIET_TRACKER)
    if current().start_method == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload(["flm_megatron.distributed.preload"])
    return current().start_method


def _stopped_early(processes: list[BaseProcess], error: ProcessException, asked: bool) -> bool:
    """Whether a rank was stopped before it trained: it says so, or the signal killed it before it could listen."""
    died = asked and getattr(error, "signal_name", None) == signal.SIGTERM.name
    return died or any(process.exitcode == STOPPED for process in processes)


class _Passing:
    """Passes signals on to processes; signals that come while these are being started are passed on afterwards."""

    def __init__(self) -> None:
        self.asked = False
        self.processes: list[BaseProcess] = []

    def again(self) -> None:
        """Repeat a signal for a process that could not hear it yet."""
        if self.asked:
            self._send()

    def to(self, processes: list[BaseProcess]) -> None:
        """From now on signals go to `processes`."""
        self.processes = processes
        self.again()

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal to this process on to the processes that it started."""
        self.asked = True
        self._send()

    def _send(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.terminate()


@contextmanager
def _passing_signals() -> Iterator[_Passing]:
    """During the block SIGTERM and SIGINT go to the processes, which stop after their step."""
    passing = _Passing()
    with handling(passing.hear):
        yield passing


def _process_main(rank: int, world_info: _World, function: Callable[..., int], args: tuple[object, ...]) -> None:
    """Main function of a started process: join the world, run, and report how it ended."""
    from flm_megatron.config.schema import DistributedConfig
    from flm_megatron.distributed.world import world

    folder = Path(world_info.folder)
    end_with_parent()
    os.environ["LOCAL_RANK"] = str(rank)
    config = DistributedConfig(timeout_s=world_info.timeout_s)
    with stop_before_training():
        try:
            with world(config, rank, world_info.size, f"file://{folder}/store"):
                status = _in_world(folder, rank, function, args)
                training_ended(status)
                if rank == 0:
                    (folder / "status").write_text(str(status))
        except StoppedBeforeTraining:
            os._exit(STOPPED)


def _in_world(folder: Path, rank: int, function: Callable[..., int], args: tuple[object, ...]) -> int:
    """The status of `function(*args)`; if it fails, report the error and end the process."""
    try:
        return function(*args)
    except StoppedBeforeTraining:
        os._exit(STOPPED)
    except BaseException as error:
        # Before the world is left: the peers fail as soon as this rank closes its connections.
        _leave_error(folder, rank, error)
        os._exit(1)


def end_with_parent() -> None:
    """End this process when its parent is gone, even by SIGKILL."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        """End when the parent does."""
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _leave_error(folder: Path, rank: int, error: BaseException) -> None:
    """Report the error of the first rank to fail; later ranks mostly fail because of it."""
    known = isinstance(error, FlmError)
    left = {
        "rank": rank,
        "status": error.status if isinstance(error, FlmError) else 1,
        "text": str(error) if known else traceback.format_exc(),
        "mistakes": (error.lines, error.where) if isinstance(error, Mistakes) else None,
        "known": known,
        "kind": type(error).__name__,
    }
    try:
        with (folder / "error").open("x") as file:
            json.dump(left, file)
    except FileExistsError:
        pass


def _first_error(folder: Path, error: ProcessException) -> FlmError:
    """The error to show: of a rank killed by a signal, or of the first rank that reported one."""
    killed = getattr(error, "signal_name", None)
    if killed is not None:
        return FlmError(f"rank {error.error_index} was killed by {killed}; the other ranks were ended")
    if not (folder / "error").exists():
        return FlmError(f"rank {error.error_index} ended with status {getattr(error, 'exit_code', 1)} without a word")
    first = json.loads((folder / "error").read_text())
    if first["mistakes"]:
        return Mistakes(*first["mistakes"])
    kind = ERRORS.get(first["kind"], FlmError if first["known"] else ProgramError)
    return kind(first["text"] if kind is RequestError else f"rank {first['rank']}: {first['text']}")
