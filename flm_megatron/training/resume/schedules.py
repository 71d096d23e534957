"""Schedules of runs that an earlier version began, which wrote its defaults out where none are given now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flm_megatron.config.schema import RunConfig, ScheduleConfig
from flm_megatron.training.resume.start import newest_manifest


def with_saved_schedules(run: RunConfig) -> RunConfig:
    """The run with the old defaults, where its newest checkpoint was trained with them and the run file gives nothing.

    Under `boundary: rewarm` they are other values than today's. Under the others they are the same, and what a run file
    leaves out is then no change.

    Raises:
        RequestError: the disk does not answer, or the checkpoint is of a newer version.
    """
    if not any(_is_open(stage.schedule) for stage in run.stages):
        return run
    saved = {stage.name: stage.saved.get("schedule") for stage in newest_manifest(run).run.stages}
    stages = [replace(stage, schedule=_as_saved(stage.schedule, saved.get(stage.name))) for stage in run.stages]
    return replace(run, stages=stages)


def _is_open(schedule: ScheduleConfig) -> bool:
    """Whether the run file leaves out what earlier versions had a number for."""
    return None in (schedule.warmup_tokens, schedule.wsd_decay_fraction)


def _as_saved(schedule: ScheduleConfig, saved: object) -> ScheduleConfig:
    if not _is_open(schedule) or not isinstance(saved, Mapping) or saved.get("boundary") != schedule.boundary:
        return schedule
    if schedule.warmup_tokens is None and saved.get("warmup_tokens") == 0:
        schedule = replace(schedule, warmup_tokens=0)
    if schedule.wsd_decay_fraction is None and saved.get("wsd_decay_fraction") == 0.1:
        schedule = replace(schedule, wsd_decay_fraction=0.1)
    return schedule
