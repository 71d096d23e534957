"""Running a whole run: by processes of this machine that are started here, or as ranks that torchrun started."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from flm_megatron.config.loader import dump_run, run_from_dict, run_to_dict
from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.durable import make_folders, replace_file
from flm_megatron.errors import ERRORS, DamagedError, FlmError, RequestError

FINISHED, STOPPED = 0, 3
GRACE_S = 5.0


def train(run: RunConfig, only: str | None = None, anew: bool = False) -> int:
    """Train what is left of the run; returns 0 when it is done, 3 when a signal stopped it after saving.

    With `anew` what the run has made so far is set aside first.

    Raises:
        RequestError: `anew` under a launcher, which may start the same command again.
    """
    from flm_megatron.training.parallel import launched
    from flm_megatron.training.start import checkpoint_store

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
    from flm_megatron.training.memory_copies import NOT_USED
    from flm_megatron.training.run_lease import run_lease
    from flm_megatron.training.start import set_aside

    for stage in run.stages:
        check(run, local_processes(run, stage), stages=[stage.name])
    with run_lease(run):
        if anew:
            set_aside(run)
        write_run_file(run)
        if run.checkpoint.memory is not None:
            print(NOT_USED, flush=True)
        return _train_what_is_left(run, only)


def _train_what_is_left(run: RunConfig, only: str | None) -> int:
    """One stage after another, each in fresh processes; a checkpoint that turns out to be damaged is passed over."""
    from flm_megatron.training.start import find_start

    while (start := find_start(run, only)) is not None:
        size = local_processes(run, run.stages[start.stage])
        try:
            status = run_processes(size, _train_child, (run_to_dict(run), start), run.distributed.timeout_s)
        except DamagedError as error:
            if find_start(run, only) == start:  # it is not of a checkpoint that can be passed over
                raise
            print(f"WARNING: {error}; trying an older checkpoint", file=sys.stderr, flush=True)
            continue
        if status != FINISHED:
            return status
    return FINISHED


def _train_as_rank(run: RunConfig, only: str | None) -> int:
    """Train every stage in the world that torchrun made."""
    import torch.distributed as dist

    from flm_megatron.training.elastic import leave_word
    from flm_megatron.training.heartbeat import heartbeat
    from flm_megatron.training.memory_copies import memory_copies
    from flm_megatron.training.parallel import is_main_rank, world
    from flm_megatron.training.run_lease import run_lease
    from flm_megatron.training.stage import train_stage
    from flm_megatron.training.start import find_start

    check(run, int(os.environ["WORLD_SIZE"]), stages=[only] if only else None)
    with world(run.distributed), heartbeat(run.distributed.timeout_s), run_lease(run), memory_copies(run) as copies:
        if is_main_rank():
            write_run_file(run)
        while True:
            agreed: list[Any] = [find_start(run, only) if is_main_rank() else None]
            dist.broadcast_object_list(agreed)
            if agreed[0] is None:
                return FINISHED
            start = copies.newer(agreed[0], only) if copies else agreed[0]
            if not train_stage(run, start, copies):
                leave_word("stopped by a signal after saving", STOPPED)
                return STOPPED


def local_processes(run: RunConfig, stage: StageConfig) -> int:
    """Processes for a stage on this machine: as the run file says, or what its layout needs."""
    return run.distributed.processes or stage.parallel.model_size * (stage.parallel.data or 1)


def write_run_file(run: RunConfig) -> None:
    """Put the resolved run file beside the run's results."""
    folder = Path(run.output)
    make_folders(folder)
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


def run_processes(size: int, function: Any, args: tuple[Any, ...], timeout_s: int = 600) -> int:
    """Run `function(*args) -> exit status` on `size` processes of this machine that share one world.

    `function` and `args` are pickled. Signals to this process are passed on. Returns rank 0's status.

    Raises:
        FlmError: a rank failed or was killed; the message names it and its error, the others are ended.
    """
    import torch.multiprocessing as multiprocessing
    from torch.multiprocessing.spawn import ProcessException

    with tempfile.TemporaryDirectory() as folder:
        processes = multiprocessing.start_processes(
            _process_main,
            args=(_World(size, folder, timeout_s), function, args),
            nprocs=size,
            join=False,
            start_method=_start_method(),
        )
        with _passing_signals(processes):
            try:
                while not processes.join(grace_period=GRACE_S):
                    pass
            except ProcessException as error:
                raise _first_error(Path(folder), error) from None
        return int((Path(folder) / "status").read_text())


def _start_method() -> str:
    """Fork from a server that has imported torch once; with CUDA, which must not be forked, start afresh."""
    import multiprocessing

    from flm_megatron.device import current

    if current().start_method == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload(["flm_megatron.training.preload"])
    return current().start_method


@contextmanager
def _passing_signals(processes: Any) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT go to the processes, which stop after their step."""

    def pass_on(number: int, frame: Any) -> None:
        """Signal handler."""
        for process in processes.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _process_main(rank: int, world_info: _World, function: Any, args: tuple[Any, ...]) -> None:
    """A started process: join the world, run, and leave word of how it ended."""
    from flm_megatron.config.schema import DistributedConfig
    from flm_megatron.training.parallel import world

    folder = Path(world_info.folder)
    _end_with_parent()
    os.environ["LOCAL_RANK"] = str(rank)
    config = DistributedConfig(timeout_s=world_info.timeout_s)
    with world(config, rank, world_info.size, f"file://{folder}/store"):
        try:
            status = function(*args)
        except BaseException as error:
            # Before the world is left: the peers fail as soon as this rank closes its connections.
            _leave_error(folder, rank, error)
            os._exit(1)
    if rank == 0:
        (folder / "status").write_text(str(status))


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
    status = error.status if isinstance(error, FlmError) else 1
    text = str(error) if isinstance(error, FlmError) else traceback.format_exc()
    try:
        with (folder / "error").open("x") as file:
            json.dump({"rank": rank, "status": status, "text": text, "kind": type(error).__name__}, file)
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
    kind = ERRORS.get(first["kind"], FlmError)
    return kind(first["text"] if kind is RequestError else f"rank {first['rank']}: {first['text']}")
