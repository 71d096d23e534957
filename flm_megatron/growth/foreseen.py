"""Checks a run file with its growths from the file alone: no checkpoint, no data, no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from flm_megatron.config.ranges import LARGEST_TOKENS
from flm_megatron.config.rules import shape_violations, violations
from flm_megatron.config.schema import GrowthConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.growth.plan import GrowthPlan, make_plan, stage_growth
from flm_megatron.growth.rules import check_epsilons, check_mask_length, check_masks_reach_norms


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
    """One line for each growth that breaks a rule."""
    mistakes = []
    for index in range(1, len(run.stages)):
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
    stage, before = run.stages[stage_index], run.stages[stage_index - 1]
    check_epsilons(run)
    plan = unmeasured_plan(before.model, run, stage, stage_growth(stage, run.data.sequence_length))
    check_masks_reach_norms(stage, plan.masked)
    if plan.masked:
        check_mask_length(stage, plan.mask_steps, run.data.sequence_length)


def unmeasured_plan(old: ModelConfig, run: RunConfig, stage: StageConfig, growth: GrowthConfig) -> GrowthPlan:
    """The plan, without the choice of copied layers where that depends on measured distances."""
    return make_plan(old, stage.model, growth, run.seed, [0.0] * old.num_layers, stage.name)
