"""Defaults of the version that began a run, which wrote them out where none are given now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.schema import RunConfig, ScheduleConfig, StageConfig
from flm_megatron.storage.path import location
from flm_megatron.training.resume.start import newest_manifest


def with_saved_defaults(run: RunConfig, manifest: Manifest | None = None) -> RunConfig:
    """The run with the old defaults, where a checkpoint of it was trained with them and the run file gives nothing.

    The checkpoint is that of `manifest`, or else the run's newest.

    A schedule under `boundary: rewarm` had other values than today's; under the other boundaries they are the same, and
    what a run file leaves out is then no change. `growth.layer_selection` was `distance`. A model that was taken from a
    tied `checkpoint.initial` was untied.

    Raises:
        RequestError: the disk does not answer, or the checkpoint is of a newer version.
    """
    tied = run.checkpoint.initial is not None and any(stage.model.tie_embeddings for stage in run.stages)
    if not tied and not any(_is_open(stage.schedule) or _selection_is_open(stage) for stage in run.stages):
        return run
    saved = {stage.name: stage.saved for stage in (manifest or newest_manifest(run)).run.stages}
    run = replace(run, stages=[_stage_as_saved(stage, saved.get(stage.name, {})) for stage in run.stages])
    return _untied(run) if tied and saved and not any(map(_was_tied, saved.values())) and _begins_tied(run) else run


def _was_tied(saved: Mapping[str, object]) -> bool:
    model = saved.get("model")
    return isinstance(model, Mapping) and bool(model.get("tie_embeddings"))


def _begins_tied(run: RunConfig) -> bool:
    """Whether `checkpoint.initial` is there and of a tied model."""
    initial = location(run.checkpoint.initial or "")
    if not initial.exists():
        return False
    found = recorded_model(open_checkpoint(initial, run.stages[0].model.vocab_size))
    return found is not None and found.tie_embeddings


def _untied(run: RunConfig) -> RunConfig:
    stages = [replace(stage, model=replace(stage.model, tie_embeddings=False)) for stage in run.stages]
    return replace(run, stages=stages)


def _stage_as_saved(stage: StageConfig, saved: Mapping[str, object]) -> StageConfig:
    schedule, growth = _as_saved(stage.schedule, saved.get("schedule")), saved.get("growth")
    by_distance = isinstance(growth, Mapping) and growth.get("layer_selection") == "distance"
    if stage.growth and _selection_is_open(stage) and by_distance:
        stage = replace(stage, growth=replace(stage.growth, layer_selection="distance"))
    return replace(stage, schedule=schedule)


def _selection_is_open(stage: StageConfig) -> bool:
    return stage.growth is not None and stage.growth.layer_selection is None


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
