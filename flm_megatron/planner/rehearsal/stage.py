"""A stage rehearsed: one rank of every role through a whole step, and their neighbours as far as they meet."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat

from flm_megatron.config.schema import ParallelConfig, RunConfig, StageConfig
from flm_megatron.distributed.local_processes import end_with_parent
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.plan import plan_stage
from flm_megatron.planner.rehearsal.meeting import check_meetings
from flm_megatron.planner.rehearsal.rank import RankReport, needed_micro_batches, rehearse_rank
from flm_megatron.planner.rehearsal.roles import Role, global_rank, roles
from flm_megatron.planner.rehearsal.timing.stage_timing import StageTiming
from flm_megatron.planner.rehearsal.timing.step import simulate_step

Job = tuple[int, int | None, Machine | None]
"""A rank, how many micro-batches it runs (as many as its memory grows over without a number), and the machine that it
is timed on."""


@dataclass(frozen=True)
class StageRehearsal:
    """What ranks of a stage did: `reports` of one rank of each of `roles` (or of the one rank that was asked for), and
    `met`, the ranks whose collectives and transfers were compared; on a machine also how long the step takes."""

    stage: str
    world: int
    roles: tuple[Role, ...]
    reports: tuple[RankReport, ...]
    met: tuple[int, ...]
    timing: StageTiming | None = None


def rehearse_stage(
    run: RunConfig,
    stage: StageConfig,
    world: int,
    rank: int | None = None,
    workers: int | None = None,
    machine: Machine | None = None,
) -> StageRehearsal:
    """Rehearse a stage whose vocabulary is known on `world` processes: one rank of every role, or `rank` alone.

    The rules of the run file have been checked. `workers` processes share the work, as many as there are processors if
    not given. With a `machine` the seconds of the step are simulated (unless for `rank` alone) and planned.

    Raises what the real ranks would raise, and FlmError where ranks would wait for each other for ever.
    """
    parallel = stage.parallel
    found = roles(stage.model, parallel)
    if rank is not None:
        report = rehearse_rank(run, stage, rank, world, machine=machine)
        own = [role for role in found if report.pipeline_rank in role.pipeline_ranks]
        alone = StageRehearsal(stage.name, world, tuple(own), (report,), ())
        return alone if machine is None else _timed(alone, run, stage, machine)
    whole = _role_jobs(parallel, world, found, machine)
    meeting = _meeting_ranks(stage, world, found)
    few = needed_micro_batches(stage, parallel.pipeline - 1)
    reports = _reports(run, stage, world, [*whole, *((one, few, None) for one in meeting)], workers)
    check_meetings(reports[len(whole) :])
    rehearsed = StageRehearsal(stage.name, world, tuple(found), tuple(reports[: len(whole)]), tuple(meeting))
    return rehearsed if machine is None else _timed(rehearsed, run, stage, machine)


def _timed(found: StageRehearsal, run: RunConfig, stage: StageConfig, machine: Machine) -> StageRehearsal:
    """With the plan of the stage, and the seconds of a step where all roles were rehearsed."""
    plan = plan_stage(stage, run.data.sequence_length, machine, found.world)
    every = sum(len(role.pipeline_ranks) for role in found.roles) == stage.parallel.pipeline
    step = simulate_step(found.roles, found.reports, stage.parallel, found.world, machine) if every else None
    return replace(found, timing=StageTiming(machine, plan, step))


def rehearse_roles(run: RunConfig, stage: StageConfig, world: int, workers: int | None = None) -> StageRehearsal:
    """As `rehearse_stage`, one rank of every role alone: who they would meet is not asked."""
    found = roles(stage.model, stage.parallel)
    reports = _reports(run, stage, world, _role_jobs(stage.parallel, world, found), workers)
    return StageRehearsal(stage.name, world, tuple(found), tuple(reports), ())


def _role_jobs(
    parallel: ParallelConfig, world: int, found: Sequence[Role], machine: Machine | None = None
) -> list[Job]:
    return [(global_rank(parallel, world, role.pipeline_ranks[0]), None, machine) for role in found]


def _meeting_ranks(stage: StageConfig, world: int, found: Sequence[Role]) -> list[int]:
    """Of every role the first and the last tensor rank and data rank, and the pipeline rank before the next role's."""
    parallel = stage.parallel
    tensor, data = parallel.tensor - 1, world // parallel.model_size - 1
    places = [(role.pipeline_ranks[0], *place) for role in found for place in ((0, 0), (tensor, 0), (0, data))]
    places += [(role.pipeline_ranks[-1], 0, 0) for role in found]
    return sorted({global_rank(parallel, world, *place) for place in places})


def _reports(
    run: RunConfig, stage: StageConfig, world: int, jobs: Sequence[Job], workers: int | None
) -> list[RankReport]:
    """Reports of the jobs, made in this process if it is the only worker, or in fresh ones."""
    ranks, micro_batches, machines = zip(*jobs, strict=True)
    operands = (repeat(run), repeat(stage), ranks, repeat(world), micro_batches, machines)
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        return list(map(rehearse_rank, *operands))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        return list(pool.map(rehearse_rank, *operands))
