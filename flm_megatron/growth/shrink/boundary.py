"""From a finished stage to the next, smaller one: rules, plan and checkpoint in one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.schema import RunConfig, ShrinkConfig
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.growth.boundary import changed_manifest, check_masks_open, check_same_tokenizer, source_model
from flm_megatron.growth.change import check_same_plan
from flm_megatron.growth.foreseen import check_boundary
from flm_megatron.growth.grown.step_offsets import has_moments
from flm_megatron.growth.record import shrinking_of
from flm_megatron.growth.rules import check_source_stage
from flm_megatron.growth.shrink.checkpoint import ShrunkCheckpoint
from flm_megatron.growth.shrink.choice import make_shrink_plan, unmeasured_importance, wanted_criteria
from flm_megatron.growth.shrink.importance import Importance, check_importance, read_importance
from flm_megatron.growth.shrink.plan import ShrinkPlan, shrunk_model
from flm_megatron.growth.shrink.rules import check_shrinking


def shrunk_checkpoint(
    source: LogicalCheckpoint, run: RunConfig, stage_index: int, importance: Importance
) -> ShrunkCheckpoint:
    """Stage `stage_index` of `run` as it starts: what it keeps of `source`, the checkpoint of the stage before.

    The checkpoint's manifest is that of the new stage at step 0, with tokens, samples and Adam's step carried over.
    Nothing is read from `source` yet.

    Raises:
        RequestError: it cannot be shrunk as asked, or the importance is that of another model.
    """
    check_boundary(run, stage_index)
    stage = run.stages[stage_index]
    check_source_stage(run, stage_index, source.manifest.position.stage)
    check_masks_open(source.manifest)
    old = source_model(source, run, stage_index)
    check_same_tokenizer(source.manifest, run, old, "shrinking")
    check_importance(importance, old, _settings(run, stage_index).importance or "the importance")
    plan = make_shrink_plan(old, stage.model, _settings(run, stage_index), importance, stage.name)
    return ShrunkCheckpoint(source, plan, changed_manifest(source, run, stage_index, plan.new, has_moments(source)))


def given_importance(run: RunConfig, stage_index: int) -> Importance | None:
    """The importance in the file that the run file names for a stage; none if it is to be measured.

    Raises:
        RequestError: there is no such file, or it is no importance, or damaged.
    """
    path = _settings(run, stage_index).importance
    try:
        return None if path is None else read_importance(Path(path))
    except DamagedError as error:  # which is of no checkpoint, so that no older one can take its place
        raise RequestError(f"stages.{stage_index}.shrink.importance: {error}: measure it anew") from None


def unmeasured_checkpoint(source: LogicalCheckpoint, run: RunConfig, stage_index: int) -> ShrunkCheckpoint:
    """`shrunk_checkpoint` where nothing is measured: by the file that the run file names, else by made-up importance
    whose choice is spread evenly over the units. Raises as `given_importance` too."""
    importance = given_importance(run, stage_index)
    if importance is None:
        importance = unmeasured_importance(source_model(source, run, stage_index), _settings(run, stage_index))
    return shrunk_checkpoint(source, run, stage_index, importance)


def resumed_shrinking(run: RunConfig, index: int, saved: Manifest) -> ShrinkPlan | None:
    """The plan that the stage of a checkpoint was shrunk with, compared with what this run file asks for.

    What was measured stays: the units that are kept, and the factors on norms.

    Raises:
        RequestError: they differ; the message names the first difference.
    """
    record, stage = shrinking_of(saved), run.stages[index]
    if record is None:
        return None
    plan, shrink = record.plan, _settings(run, index)
    check_shrinking(plan.old, stage.model)
    scales = plan.norm_scales if shrink.rescale_norms else ()
    now = replace(
        plan,
        stage=stage.name,
        new=shrunk_model(plan.old, stage.model, scales),
        criteria=wanted_criteria(shrink),
        rescale_norms=shrink.rescale_norms,
    )
    check_same_plan(plan, now)
    return plan


def _settings(run: RunConfig, index: int) -> ShrinkConfig:
    return run.stages[index].shrink or ShrinkConfig()
