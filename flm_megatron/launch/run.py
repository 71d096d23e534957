"""Running a whole run: by processes of this machine that are started here, or as ranks that torchrun started."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_megatron.checkpoint.lease.fence import Fence, check_fences, fenced, standing_fences
from flm_megatron.config.loader import dump_run, run_from_dict, run_to_dict
from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.durable import make_folders, replace_file
from flm_megatron.errors import ERRORS, DamagedError, FlmError, Mistakes, ProgramError, RequestError, refuse_together
from flm_megatron.training.signals import STOPPED, StoppedBeforeTraining, handling, stop_before_training, training_ended

if TYPE_CHECKING:
    from flm_megatron.training.resume.start import Start

FINISHED = 0
SAVED = "stopped by a signal after saving"
MOST_PROCESSES, PROCESSES_PER_CORE = 64, 8
"""Processes of one machine: for a layout tried out on few cores, and for one that uses them."""
GRACE_S = 5.0
RESEND_S = 1.0
QUIET_TRACKER = "ignore:resource_tracker"
"""After a rank was killed Python's resource tracker says that it cleans up; that must not hide who was killed."""


def train(run: RunConfig, only: str | None = None, anew: bool = False) -> int:
    """Train what is left of the run; returns 0 when it is done, 3 when a signal stopped it after saving.

    With `anew` what the run has made so far is set aside first.

    Raises:
        RequestError: `anew` under a launcher, which may start the same command again.
    """
    from flm_megatron.distributed.world import launched
    from flm_megatron.training.resume.start import checkpoint_store

    if not launched():
        return _train_locally(run, only, anew)
    if anew:
        raise RequestError(
            "--start-anew is for a run without a launcher, which would begin anew at every restart: move "
            f"{checkpoint_store(run).root} away by hand, or choose another output"
        )
    return _train_as_rank(run, only)


def _train_locally(run: RunConfig, only: str | None, anew: bool) -> int:
    """Start fresh processes for one stage after another, as many as its layout needs."""
    from flm_megatron.launch.run_lease import run_lease
    from flm_megatron.training.resume.memory_copies import NOT_USED
    from flm_megatron.training.resume.start import checked_start, set_aside

    check_local(run)
    with run_lease(run):
        if anew:
            set_aside(run)
        start = checked_start(run, only)
        write_run_file(run)
        if run.checkpoint.memory is not None:
            print(NOT_USED, flush=True)
        return _train_what_is_left(run, only, start)


def _train_what_is_left(run: RunConfig, only: str | None, start: Start | None) -> int:
    """One stage after another, each in fresh processes; a checkpoint that turns out to be damaged is passed over."""
    from flm_megatron.launch.outcome import report_end
    from flm_megatron.training.resume.start import find_start

    while start is not None:
        size = local_processes(run, run.stages[start.stage])
        try:
            status = run_processes(size, _train_child, (run_to_dict(run), start), run.distributed.timeout_s)
        except DamagedError as error:
            damaged, start = start, find_start(run, only)
            if start is None or start.passed_over == damaged.passed_over:  # it is not of one that can be passed over
                raise
            print(f"WARNING: {error}; trying an older checkpoint", file=sys.stderr, flush=True)
            continue
        if status != FINISHED:
            training_ended(status)
            report_end(run, status)
            return status
        start = find_start(run, only)
    training_ended(FINISHED)
    report_end(run, FINISHED)
    return FINISHED


def check_local(run: RunConfig) -> None:
    """Check every stage on as many processes as it would have here.

    Raises:
        Mistakes: broken rules, or more processes than this machine can be meant to run.
    """
    refuse_together(partial(_check_local_stage, run, stage) for stage in run.stages)


def _check_local_stage(run: RunConfig, stage: StageConfig) -> None:
    size = local_processes(run, stage)
    require_processes(size, f"stage {stage.name!r}")
    check(run, size, stages=[stage.name])


def require_processes(size: int, what: str) -> None:
    """Check that this machine may be asked to start `size` processes. Raises RequestError, naming `what` needs them."""
    most = max(MOST_PROCESSES, PROCESSES_PER_CORE * (os.cpu_count() or 1))
    if size > most:
        raise RequestError(
            f"{what} needs {size:,} processes, and this machine is good for {most}: start it on a cluster (`flm "
            "launch`, torchrun), or give it a smaller layout"
        )


def _train_as_rank(run: RunConfig, only: str | None) -> int:
    """Train every stage in the world that torchrun made."""
    from flm_megatron.distributed.processes import Processes
    from flm_megatron.distributed.world import is_main_rank, world
    from flm_megatron.launch.elastic import leave_word
    from flm_megatron.launch.heartbeat import heartbeat
    from flm_megatron.launch.outcome import report_end
    from flm_megatron.launch.run_lease import run_lease
    from flm_megatron.training.resume.memory_copies import memory_copies
    from flm_megatron.training.resume.start import checked_start, find_start
    from flm_megatron.training.stage import train_stage

    check(run, int(os.environ["WORLD_SIZE"]), stages=[only] if only else None)
    with world(run.distributed), heartbeat(run.distributed.timeout_s), run_lease(run), memory_copies(run) as copies:
        start = Processes().on_first(partial(checked_start, run, only))
        if is_main_rank():
            write_run_file(run)
        while start is not None and train_stage(run, copies.newer(start, only) if copies else start, copies):
            start = Processes().on_first(partial(find_start, run, only))
        finished = start is None
        training_ended(*((FINISHED, "") if finished else (STOPPED, SAVED)))
        if is_main_rank():
            report_end(run, FINISHED if finished else STOPPED)
    if not finished:
        leave_word(SAVED, STOPPED)
    return FINISHED if finished else STOPPED


def local_processes(run: RunConfig, stage: StageConfig) -> int:
    """Processes for a stage on this machine: as the run file says, or what its layout needs."""
    return run.distributed.processes or stage.parallel.model_size * (stage.parallel.data or 1)


def write_run_file(run: RunConfig) -> None:
    """Put the resolved run file beside the run's results; it is there whole, or as it was."""
    folder = Path(run.output)
    make_folders(folder)
    check_fences()
    replace_file(folder / "run.yaml", dump_run(run).encode())


def _train_child(data: dict[str, Any], start: Any) -> int:
    from flm_megatron.training.stage import train_stage

    return FINISHED if train_stage(run_from_dict(data), start) else STOPPED


@dataclass(frozen=True)
class _World:
    """What a started process needs to know to join the others."""

    size: int
    folder: str
    timeout_s: int
    fences: tuple[Fence, ...]


def run_processes(size: int, function: Any, args: tuple[Any, ...], timeout_s: int = 600) -> int:
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
            args=(_World(size, folder, timeout_s, standing_fences()), function, args),
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
    """Fork from a server that has imported torch once; with CUDA, which must not be forked, start afresh."""
    import multiprocessing

    from flm_megatron.device import current

    if QUIET_TRACKER not in sys.warnoptions:  # which Python hands on to its helper processes
        sys.warnoptions.append(QUIET_TRACKER)
    if current().start_method == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload(["flm_megatron.launch.preload"])
    return current().start_method


def _stopped_early(processes: list[Any], error: Any, asked: bool) -> bool:
    """Whether a rank was stopped before it trained: it says so, or died of the signal before it could listen."""
    died = asked and getattr(error, "signal_name", None) == signal.SIGTERM.name
    return died or any(process.exitcode == STOPPED for process in processes)


class _Passing:
    """Passes signals on to processes; one that comes while they are being started, when they are."""

    def __init__(self) -> None:
        self.asked = False
        self.processes: list[Any] = []

    def again(self) -> None:
        """Repeat a signal that has come, for a process that could not hear it yet."""
        if self.asked:
            self._send()

    def to(self, processes: list[Any]) -> None:
        """From now on signals go to `processes`."""
        self.processes = processes
        self.again()

    def hear(self, number: int, frame: Any) -> None:
        """Signal handler."""
        self.asked = True
        self._send()

    def _send(self) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)


@contextmanager
def _passing_signals() -> Iterator[_Passing]:
    """While the block runs, SIGTERM and SIGINT go to the processes, which stop after their step."""
    passing = _Passing()
    with handling(passing.hear):
        yield passing


def _process_main(rank: int, world_info: _World, function: Any, args: tuple[Any, ...]) -> None:
    """A started process: join the world, run, and leave word of how it ended."""
    from flm_megatron.config.schema import DistributedConfig
    from flm_megatron.distributed.world import world

    folder = Path(world_info.folder)
    _end_with_parent()
    os.environ["LOCAL_RANK"] = str(rank)
    config = DistributedConfig(timeout_s=world_info.timeout_s)
    with stop_before_training(), fenced(world_info.fences):
        try:
            with world(config, rank, world_info.size, f"file://{folder}/store"):
                status = _in_world(folder, rank, function, args)
                training_ended(status)
                if rank == 0:
                    (folder / "status").write_text(str(status))
        except StoppedBeforeTraining:
            os._exit(STOPPED)


def _in_world(folder: Path, rank: int, function: Any, args: tuple[Any, ...]) -> int:
    """The status of `function(*args)`; where it fails, this process leaves word and ends."""
    try:
        return function(*args)
    except StoppedBeforeTraining:
        os._exit(STOPPED)
    except BaseException as error:
        # Before the world is left: the peers fail as soon as this rank closes its connections.
        _leave_error(folder, rank, error)
        os._exit(1)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, even by SIGKILL."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        """End when the parent does."""
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _leave_error(folder: Path, rank: int, error: BaseException) -> None:
    """The first rank to fail says why; later ones mostly fail because of it."""
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


def _first_error(folder: Path, error: Any) -> FlmError:
    """The error to show: a rank killed by a signal, or the first that left word."""
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
