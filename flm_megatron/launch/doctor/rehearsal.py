"""Ranks of the run through one step at their true size, as one of the doctor's findings."""

from __future__ import annotations

from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.errors import FlmError
from flm_megatron.launch.doctor.findings import Finding
from flm_megatron.launch.fine_tuning import without_conversations
from flm_megatron.launch.run import local_processes

GIB = 2**30


def rehearsed(run: RunConfig, world: int | None) -> list[Finding]:
    """One finding for each stage: the most memory that a rank holds, or what the rank ran into.

    `world` is the number of processes; without it each stage has as many as its layout needs.
    """
    return [_stage(run, stage, world or local_processes(run, stage)) for stage in run.stages]


def _stage(run: RunConfig, stage: StageConfig, world: int) -> Finding:
    from flm_megatron.planner.chosen_stages import only_stage, whole_run, with_vocabulary
    from flm_megatron.planner.rehearsal.stage import rehearse_stage

    try:
        run = run if run.data.chat is None else without_conversations(run)
        whole = whole_run(run, with_vocabulary(only_stage(run, stage.name)))
        found = rehearse_stage(whole, whole.stages[stage_index(whole, stage.name)], world)
    except FlmError as error:
        return Finding("stop", "rehearsal", f"stage {stage.name}: {error}")
    most = max(found.reports, key=lambda report: report.most_bytes)
    text = f"stage {stage.name}: rank {most.rank} holds most, {most.most_bytes / GIB:.2f} GiB"
    return Finding("ok", "rehearsal", f"{text}; {len(found.met)} ranks meet in every collective")
