"""Ranks of the run through one step at their true size, as one of the doctor's findings."""

from __future__ import annotations

import os
from dataclasses import replace

from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.errors import FlmError
from flm_megatron.launch.doctor.findings import Finding
from flm_megatron.launch.run import local_processes

GIB = 2**30


def rehearsed(run: RunConfig, world: int | None) -> list[Finding]:
    """One finding for each stage: the most memory that a rank holds, or what the rank ran into.

    `world` is the number of processes; without it each stage has as many as its layout needs.
    """
    return [_stage(run, stage, world or local_processes(run, stage)) for stage in run.stages]


def _stage(run: RunConfig, stage: StageConfig, world: int) -> Finding:
    from flm_megatron.planner.chosen_stages import with_vocabulary
    from flm_megatron.planner.rehearsal.stage import rehearse_stage

    try:
        alone = with_vocabulary(replace(run, stages=[replace(stage, growth=None)]))
        found = rehearse_stage(alone, alone.stages[0], world, workers=os.cpu_count() or 1)
    except FlmError as error:
        return Finding("stop", "rehearsal", f"stage {stage.name}: {error}")
    held, rank = max((max(one.building.nbytes, one.peak.nbytes), one.rank) for one in found.reports)
    text = f"stage {stage.name}: rank {rank} holds most, {held / GIB:.2f} GiB"
    return Finding("ok", "rehearsal", f"{text}; {len(found.met)} ranks meet in every collective")
