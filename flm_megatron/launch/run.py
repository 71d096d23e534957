"""Runs a whole run: in processes of this machine that are started here, or as the ranks that torchrun started."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.checkpoint.lease.fence import Fence, check_fences, fenced, standing_fences
from flm_megatron.config.loader import dump_run, run_from_dict, run_to_dict
from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.distributed.local_processes import require_processes, run_processes
from flm_megatron.distributed.signals import STOPPED, training_ended
from flm_megatron.durable import make_folders, replace_file
from flm_megatron.errors import DamagedError, RequestError, refuse_together
from flm_megatron.json_text import JsonObject

if TYPE_CHECKING:
    from flm_megatron.training.resume.memory_copies import MemoryCopies
    from flm_megatron.training.resume.start import Start
    from flm_megatron.training.telemetry import Observers

FINISHED = 0
SAVED = "stopped by a signal after saving"


def train(run: RunConfig, only: str | None = None, anew: bool = False) -> int:
    """Train what is left of the run; returns 0 when it is done, 3 when a signal stopped it after saving.

    With `anew` what the run has made so far is set aside first.

    Raises:
        RequestError: `anew` under a launcher, which may start the same command again.
    """
    from flm_megatron.distributed.world import launched
    from flm_megatron.training.resume.saved_defaults import with_saved_defaults
    from flm_megatron.training.resume.start import checkpoint_store

    run = run if anew else with_saved_defaults(run)
    if not launched():
        return _train_locally(run, only, anew)
    if anew:
        raise RequestError(
            "--start-anew is for a run without a launcher, which would begin anew at every restart: move "
            f"{checkpoint_store(run).root} away by hand, or choose another output"
        )
    return _train_as_rank(run, only)


def _train_locally(run: RunConfig, only: str | None, anew: bool) -> int:
    """Start fresh processes for each stage, as many as its layout needs."""
    from flm_megatron.launch.branch import bring_metrics, require_no_branch_in_training
    from flm_megatron.launch.run_lease import run_lease
    from flm_megatron.launch.tracking import tracked
    from flm_megatron.training.distillation.source import check_teachers
    from flm_megatron.training.resume import live, memory_copies
    from flm_megatron.training.resume.start import checked_start, has_checkpoints, set_aside

    check_local(run)
    if anew or not has_checkpoints(run):
        check_teachers(run, only=only, anew=anew)
    with run_lease(run):
        if anew:
            require_no_branch_in_training(run)
            set_aside(run)
        start = checked_start(run, only)
        if start is not None:
            check_teachers(run, start.stage, only)
        write_run_file(run)
        bring_metrics(run, start)
        if run.checkpoint.memory is not None:
            print(memory_copies.NOT_USED, flush=True)
        if run.checkpoint.live_boundaries and start is not None and start.stage + 1 < len(run.stages):
            print(live.NOT_USED, flush=True)
        with tracked(run) as tracking:
            status = _train_what_is_left(run, only, start)
            if tracking:
                tracking.status = "finished" if status == FINISHED else "stopped"
            return status


def _train_what_is_left(run: RunConfig, only: str | None, start: Start | None) -> int:
    """Train the remaining stages, each in fresh processes; passes over checkpoints found damaged."""
    from flm_megatron.launch.outcome import report_end
    from flm_megatron.training.resume.start import find_start

    while start is not None:
        size = local_processes(run, run.stages[start.stage])
        try:
            what = (run_to_dict(run), start, standing_fences())
            status = run_processes(size, _train_child, what, run.distributed.timeout_s)
        except DamagedError as error:
            damaged, start = start, find_start(run, only)
            if start is None or start.passed_over == damaged.passed_over:  # it is not of one that can be passed over
                raise
            print(f"WARNING: {error}; trying an older checkpoint", file=sys.stderr, flush=True)
            continue
        if status in (FINISHED, STOPPED):
            start = find_start(run, only)
        if status != FINISHED and start is not None:
            training_ended(status)
            report_end(run, status)
            return status
    training_ended(FINISHED)
    report_end(run, FINISHED)
    return FINISHED


def check_local(run: RunConfig) -> None:
    """Check every stage for the number of processes it would have here.

    Raises:
        Mistakes: broken rules, more processes than this machine can be meant to run, or a port that is taken.
    """
    refuse_together([*(partial(_check_local_stage, run, stage) for stage in run.stages), partial(_check_ports, run)])


def _check_ports(run: RunConfig) -> None:
    """Check that Prometheus can be answered. Raises RequestError if a port is taken."""
    from flm_megatron.training.telemetry.opening import require_ports

    if run.logging.prometheus:
        require_ports(run.logging.prometheus, max(local_processes(run, stage) for stage in run.stages))


def _check_local_stage(run: RunConfig, stage: StageConfig) -> None:
    size = local_processes(run, stage)
    require_processes(size, f"stage {stage.name!r}")
    check(run, size, stages=[stage.name])


def _train_as_rank(run: RunConfig, only: str | None) -> int:
    """Train every stage in torchrun's world."""
    from flm_megatron.distributed.error_file import write_error_file
    from flm_megatron.distributed.processes import Processes
    from flm_megatron.distributed.world import is_main_rank, world
    from flm_megatron.launch.branch import bring_metrics
    from flm_megatron.launch.heartbeat import heartbeat
    from flm_megatron.launch.outcome import report_end
    from flm_megatron.launch.run_lease import run_lease
    from flm_megatron.launch.tracking import tracked
    from flm_megatron.training.distillation.source import check_teachers
    from flm_megatron.training.resume.memory_copies import first_start, memory_copies

    check(run, int(os.environ["WORLD_SIZE"]), stages=[only] if only else None)
    with (
        ExitStack() as last,  # other ranks do not wait for trackers
        world(run.distributed),
        heartbeat(run.distributed.timeout_s),
        run_lease(run),
        memory_copies(run) as copies,
    ):
        start = first_start(run, only, copies)
        if start is not None and any(stage.distill for stage in run.stages):
            Processes().on_first(partial(check_teachers, run, start.stage, only))
        if is_main_rank():
            write_run_file(run)
            bring_metrics(run, start)
        tracking = last.enter_context(tracked(run))
        with observed(run) as observers:
            finished = train_stages(run, only, start, copies, observers)
        if tracking:
            tracking.status = "finished" if finished else "stopped"
        training_ended(*((FINISHED, "") if finished else (STOPPED, SAVED)))
        if is_main_rank():
            report_end(run, FINISHED if finished else STOPPED)
    if not finished:
        write_error_file(SAVED, STOPPED)
    return FINISHED if finished else STOPPED


def train_stages(
    run: RunConfig,
    only: str | None,
    start: Start | None,
    copies: MemoryCopies | None = None,
    observers: Observers | None = None,
) -> bool:
    """On the ranks of one world, train what is left from `start` on (nothing if none); returns whether all is done.

    False means that a signal stopped it after saving.
    """
    from flm_megatron.distributed.processes import Processes
    from flm_megatron.evaluation.while_training import evaluation_hooks
    from flm_megatron.training.resume.live import LiveBoundary
    from flm_megatron.training.resume.start import find_start
    from flm_megatron.training.stage import train_stage

    live = LiveBoundary() if run.checkpoint.live_boundaries else None
    goes_on = True
    while start is not None and goes_on:
        goes_on = train_stage(run, start, copies, live, evaluation_hooks, observers)
        start = Processes().on_first(partial(find_start, run, only))
        if start is not None and copies is not None:
            start = copies.newer(start, only)
    return start is None


def local_processes(run: RunConfig, stage: StageConfig) -> int:
    """Processes for a stage on this machine: as the run file says, else what its layout needs."""
    return run.distributed.processes or stage.parallel.processes


def write_run_file(run: RunConfig) -> None:
    """Write the resolved run file beside the run's results; it is replaced as a whole or not at all."""
    folder = Path(run.output)
    make_folders(folder)
    check_fences()
    replace_file(folder / "run.yaml", dump_run(run).encode())


def observed(run: RunConfig) -> AbstractContextManager[Observers]:
    """Prometheus and OpenTelemetry for this rank of the world, as the run file asks."""
    import torch.distributed as dist

    from flm_megatron.device import current
    from flm_megatron.training.telemetry import telemetry

    return telemetry(run, dist.get_rank(), dist.get_world_size(), lambda: current().peak_memory_gib())


def _train_child(data: JsonObject, start: Start, fences: tuple[Fence, ...]) -> int:
    """In a started process: train the stage, under the leases of the parent process."""
    from flm_megatron.evaluation.while_training import evaluation_hooks
    from flm_megatron.training.stage import train_stage

    run = run_from_dict(data)
    with fenced(fences), observed(run) as observers:
        finished = train_stage(run, start, more_hooks=evaluation_hooks, observers=observers)
    return FINISHED if finished else STOPPED
