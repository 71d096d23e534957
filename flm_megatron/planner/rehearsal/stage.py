"""A stage rehearsed: one rank of every role through a whole step, and their neighbours as far as they meet."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

from flm_megatron.config.schema import ParallelConfig, RunConfig, StageConfig
from flm_megatron.planner.rehearsal.meeting import check_meetings
from flm_megatron.planner.rehearsal.rank import RankReport, needed_micro_batches, rehearse_rank
from flm_megatron.planner.rehearsal.roles import Role, global_rank, roles

Job = tuple[int, int | None]
"""A rank, and how many micro-batches it runs (as many as its memory grows over without a number)."""


@dataclass(frozen=True)
class StageRehearsal:
    """What ranks of a stage did: `reports` of one rank of each of `roles` (or of the one rank that was asked for), and
    `met`, the ranks whose collectives and transfers were compared."""

    stage: str
    world: int
    roles: tuple[Role, ...]
    reports: tuple[RankReport, ...]
    met: tuple[int, ...]


def rehearse_stage(
    run: RunConfig, stage: StageConfig, world: int, rank: int | None = None, workers: int | None = None
) -> StageRehearsal:
    """Rehearse a stage whose vocabulary is known on `world` processes: one rank of every role, or `rank` alone.

    The rules of the run file have been checked. `workers` processes share the work, as many as there are processors if
    not given.

    Raises what the real ranks would raise, and FlmError where ranks would wait for each other for ever.
    """
    parallel = stage.parallel
    found = roles(stage.model, parallel)
    if rank is not None:
        report = rehearse_rank(run, stage, rank, world)
        own = [role for role in found if report.pipeline_rank in role.pipeline_ranks]
        return StageRehearsal(stage.name, world, tuple(own), (report,), ())
    whole = _role_jobs(parallel, world, found)
    meeting = _meeting_ranks(stage, world, found)
    few = needed_micro_batches(stage, parallel.pipeline - 1)
    reports = _reports(run, stage, world, [*whole, *((one, few) for one in meeting)], workers)
    check_meetings(reports[len(whole) :])
    return StageRehearsal(stage.name, world, tuple(found), tuple(reports[: len(whole)]), tuple(meeting))


def rehearse_roles(run: RunConfig, stage: StageConfig, world: int, workers: int | None = None) -> StageRehearsal:
    """As `rehearse_stage`, one rank of every role alone: who they would meet is not asked."""
    found = roles(stage.model, stage.parallel)
    reports = _reports(run, stage, world, _role_jobs(stage.parallel, world, found), workers)
    return StageRehearsal(stage.name, world, tuple(found), tuple(reports), ())


def _role_jobs(parallel: ParallelConfig, world: int, found: Sequence[Role]) -> list[Job]:
    return [(global_rank(parallel, world, role.pipeline_ranks[0]), None) for role in found]


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
    ranks, micro_batches = zip(*jobs, strict=True)
    operands = (repeat(run), repeat(stage), ranks, repeat(world), micro_batches)
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        return list(map(rehearse_rank, *operands))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(rehearse_rank, *operands))
