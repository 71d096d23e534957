"""Checks a run file with its growths and shrinkings from the file alone: no checkpoint, no data, no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from flm_megatron.config.budget import stage_steps
from flm_megatron.config.ranges import LARGEST_TOKENS
from flm_megatron.config.rules import change_is_missing, shape_violations, violations
from flm_megatron.config.schema import GrowthConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.growth.opening import OpeningMasks
from flm_megatron.growth.plan import GrowthPlan, TrainedScale, make_plan, stage_growth
from flm_megatron.growth.rules import (
    check_earlier_masks,
    check_epsilons,
    check_mask_length,
    check_masks_reach_norms,
)
from flm_megatron.growth.schedule import all_masks, still_opening
from flm_megatron.growth.shrink.rules import check_shrinking
from flm_megatron.model.parameters import parameter_specs


def check_run_file(run: RunConfig, world_size: int | None = None, stages: Collection[str] | None = None) -> None:
    """Check the rules of the run file and of every growth in it, without looking at the disk.

    `world_size` and `stages` are as in `config.rules.check`. A fine-tuning's token budgets follow from its epochs and
    its models from its checkpoint, so neither they nor the rules on them are checked; its stages share one model and do
    not grow.

    Raises:
        Mistakes: one line for every rule that is broken.
    """
    models = True
    if run.data.chat is not None:
        run = replace(run, stages=[replace(stage, tokens=LARGEST_TOKENS) for stage in run.stages])
        models = all(stage.model.vocab_size for stage in run.stages)
    broken = violations(run, world_size, stages, models)
    if models and run.data.chat is None and not shape_violations(run):
        broken += _growth_mistakes(run)
    if broken:
        raise Mistakes(list(dict.fromkeys(broken)))


def _growth_mistakes(run: RunConfig) -> list[str]:
    """One line for each growth or shrinking that breaks a rule. Other rules speak of a stage that says both, or neither
    though its shape is another."""
    mistakes = []
    for index, stage in enumerate(run.stages):
        both = stage.growth is not None and stage.shrink is not None
        if both or (index and change_is_missing(run.stages[index - 1], stage)):
            continue
        try:
            check_boundary(run, index)
        except RequestError as error:
            mistakes.append(str(error))
    return mistakes


def check_boundary(run: RunConfig, stage_index: int) -> None:
    """Check a growth as far as the run file alone allows, before anything starts.

    Raises:
        RequestError: the growth cannot be done as asked.
    """
    if stage_index < 1:
        return
    check_epsilons(run)
    if run.stages[stage_index].shrink is not None:
        check_shrinking_stage(run, stage_index)
        return
    plan = foreseen_plan(run, stage_index)
    if plan.masked:
        check_mask_length(run.stages[stage_index:], plan.mask_steps, run.data.sequence_length)
    check_masks(run, stage_index, plan)


def check_shrinking_stage(run: RunConfig, stage_index: int) -> None:
    """Check a stage whose model is smaller than the one before, as far as the run file alone allows.

    Raises:
        RequestError: it cannot be cut out of that.
    """
    stage = run.stages[stage_index]
    check_shrinking(run.stages[stage_index - 1].model, stage.model)
    for masks in foreseen_masks(run, stage_index):
        raise RequestError(
            f"stage {stage.name!r} shrinks in the middle of the growth mask of stage {masks.stage!r} "
            f"(v = {masks.value(0):.3f}, open after {masks.left} steps more): train stage {masks.stage!r} until it is "
            "open first, or give it fewer growth.mask_steps"
        )


def check_masks(run: RunConfig, stage_index: int, plan: GrowthPlan) -> None:
    """Check that a stage can train behind all masks of its plan, those of earlier growths among them.

    Raises:
        RequestError: it cannot.
    """
    stages = run.stages[stage_index:]
    check_earlier_masks(stages, plan.earlier_masks, plan.grows, run.data.sequence_length)
    check_masks_reach_norms(stages[0], [name for masks in all_masks(plan) for name in masks.masks.dimensions])


def foreseen_plan(run: RunConfig, stage_index: int) -> GrowthPlan:
    """The plan that a stage will begin with by the run file alone: nothing is measured, every stage ends as it says."""
    stage, length = run.stages[stage_index], run.data.sequence_length
    plan = unmeasured_plan(run.stages[stage_index - 1].model, run, stage, stage_growth(stage, length))
    return replace(plan, earlier_masks=foreseen_masks(run, stage_index))


def foreseen_masks(run: RunConfig, stage_index: int) -> tuple[OpeningMasks, ...]:
    """Masks of the stages before that will not be open where a stage begins."""
    if stage_index < 2 or run.stages[stage_index - 1].shrink is not None:
        return ()
    steps = stage_steps(run.stages[stage_index - 1], run.data.sequence_length)
    return still_opening(foreseen_plan(run, stage_index - 1), steps)


def unmeasured_scale(old: ModelConfig) -> TrainedScale:
    """Stands for what is measured of an old model where nothing is drawn."""
    specs = parameter_specs(old).items()
    return TrainedScale(rms={name: (1.0,) * (spec.shape[0] if spec.stacked else 1) for name, spec in specs})


def unmeasured_plan(old: ModelConfig, run: RunConfig, stage: StageConfig, growth: GrowthConfig) -> GrowthPlan:
    """The plan, without the choice of copied layers where that depends on measured distances."""
    return make_plan(old, stage.model, growth, run.seed, [0.0] * old.num_layers, stage.name)
