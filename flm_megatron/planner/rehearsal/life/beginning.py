"""What a stage is loaded from when it resumes and when it starts: checkpoints of the run, as far as they are here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from flm_megatron.checkpoint.lazy.adapters import WithNewAdapters
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.growth.boundary import grown_checkpoint, resumed_plan, source_model
from flm_megatron.growth.foreseen import foreseen_masks, unmeasured_scale
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.shrink.boundary import resumed_shrinking, unmeasured_checkpoint
from flm_megatron.planner.rehearsal.life.counted import Counted
from flm_megatron.planner.rehearsal.life.stage_checkpoint import StageCheckpoint
from flm_megatron.storage.path import location
from flm_megatron.training.resume.first_checkpoint import first_checkpoint
from flm_megatron.training.resume.start import checkpoint_store


@dataclass(frozen=True)
class Beginning:
    """One way in which a stage begins.

    `stage` is what is trained (growth derives some of its model), `checkpoint` what its state is loaded from, `source`
    the checkpoint below that, of which reads are counted. `where` is the folder of that, none where it stands for one
    that is not on this machine or where there is none.
    """

    how: str
    where: Path | None
    stage: StageConfig
    source: Counted
    checkpoint: LogicalCheckpoint
    plan: GrowthPlan | None = None


def resumed(run: RunConfig, stage: StageConfig) -> Beginning:
    """From a checkpoint of the stage itself: its newest one, or one as it would be.

    Raises:
        RequestError: the newest one was grown otherwise than the run file asks for.
        DamagedError: there are some, and all of them are damaged.
    """
    where = _newest(run, stage)
    source = Counted(open_checkpoint(where) if where else StageCheckpoint(stage))
    if where:
        resumed_plan(run, stage_index(run, stage.name), source.manifest)
        resumed_shrinking(run, stage_index(run, stage.name), source.manifest)
    return Beginning(f"resumed from a checkpoint of {stage.name}", where, stage, source, source)


def started(run: RunConfig, stage: StageConfig) -> Beginning:
    """As the run's first stage does, or after the stage before, out of which it grows or shrinks unless it is a
    fine-tuning's.

    Nothing is measured: layers that would be copied by distance are those of no distance at all, units that would be
    kept by importance are spread evenly.

    Raises:
        RequestError: it cannot begin so: another model than the checkpoint's, a growth that cannot be done.
        DamagedError: a checkpoint cannot be read.
    """
    index = stage_index(run, stage.name)
    if index == 0:
        return _first(run, stage)
    before = run.stages[index - 1]
    where = _newest(run, before)
    source = Counted(open_checkpoint(where) if where else StageCheckpoint(before))
    if run.data.chat is not None:
        return Beginning(f"started from stage {before.name}", where, stage, source, source)
    if stage.shrink is not None:
        shrunk = unmeasured_checkpoint(source, run, index)
        return Beginning(
            f"shrunk from stage {before.name}", where, replace(stage, model=shrunk.plan.new), source, shrunk
        )
    model = source_model(source, run, index)
    grown, plan = grown_checkpoint(source, run, index, [0.0] * model.num_layers, unmeasured_scale(model))
    if where is None:
        plan = replace(plan, earlier_masks=foreseen_masks(run, index))
    trained = replace(stage, model=plan.new)
    return Beginning(f"grown from stage {before.name}", where, trained, source, grown, plan)


def _first(run: RunConfig, stage: StageConfig) -> Beginning:
    initial = location(run.checkpoint.initial) if run.checkpoint.initial else None
    here = initial if initial is not None and initial.exists() else None
    if initial is not None and here is None:
        found: LogicalCheckpoint = StageCheckpoint(replace(stage, model=replace(stage.model, lora=None)))
    else:
        found = first_checkpoint(run, stage.model, here)
    if initial is None:
        return Beginning("started with fresh weights", None, stage, Counted(found), found)
    source = Counted(found.source if isinstance(found, WithNewAdapters) else found)
    adapted = source if stage.model.lora is None else WithNewAdapters(source, stage.model, run.seed)
    return Beginning("started from checkpoint.initial", here, stage, source, adapted)


def _newest(run: RunConfig, stage: StageConfig) -> Path | None:
    return checkpoint_store(run).latest([stage.name])
