"""Schedules of runs that an earlier version began, whose defaults were others under `boundary: rewarm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flm_megatron.config.schema import RunConfig, ScheduleConfig
from flm_megatron.training.resume.start import newest_manifest


def with_saved_schedules(run: RunConfig) -> RunConfig:
    """The run with the old defaults, where its newest checkpoint was trained with them and the run file gives nothing.

    Raises:
        RequestError: the disk does not answer, or the checkpoint is of a newer version.
    """
    if not any(_is_open(stage.schedule) for stage in run.stages):
        return run
    saved = {stage.name: stage.saved.get("schedule") for stage in newest_manifest(run).run.stages}
    stages = [replace(stage, schedule=_as_saved(stage.schedule, saved.get(stage.name))) for stage in run.stages]
    return replace(run, stages=stages)


def _is_open(schedule: ScheduleConfig) -> bool:
    """Whether a default of the schedule was another in earlier versions."""
    return schedule.boundary == "rewarm" and None in (schedule.warmup_tokens, schedule.wsd_decay_fraction)


def _as_saved(schedule: ScheduleConfig, saved: object) -> ScheduleConfig:
    if not _is_open(schedule) or not isinstance(saved, Mapping) or saved.get("boundary") != "rewarm":
        return schedule
    if schedule.warmup_tokens is None and saved.get("warmup_tokens") == 0:
        schedule = replace(schedule, warmup_tokens=0)
    if schedule.wsd_decay_fraction is None and saved.get("wsd_decay_fraction") == 0.1:
        schedule = replace(schedule, wsd_decay_fraction=0.1)
    return schedule
