"""From a finished stage to the next: the rules, the plan and the grown view, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import GrowthConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.plan import GrowthPlan, check_same_plan, make_plan, stage_growth
from flm_megatron.growth.rules import (
    check_epsilons,
    check_mask_length,
    check_masks_reach_norms,
    check_source_stage,
)
from flm_megatron.growth.schedule import mask_value
from flm_megatron.growth.view import GrownCheckpoint


def grown_view(
    source: LogicalCheckpoint, run: RunConfig, stage_index: int, distances: Sequence[float] | None = None
) -> tuple[GrownCheckpoint, GrowthPlan]:
    """Stage `stage_index` of `run` as it starts: `source`, the checkpoint of the stage before, grown.

    `distances` (one per old layer) are needed where `needs_distances` says so. The view's manifest is that of the
    new stage at step 0, with tokens, samples and Adam's step carried over. Nothing is read from `source` yet.

    Raises:
        RequestError: the growth cannot be done as asked.
    """
    check_boundary(run, stage_index)
    stage = run.stages[stage_index]
    check_source_stage(run, stage_index, source.manifest.get("stage"))
    check_masks_open(source.manifest)
    check_same_tokenizer(source.manifest, run)
    growth = stage_growth(stage, run.data.sequence_length)
    plan = make_plan(source_model(source, run, stage_index), stage.model, growth, run.seed, distances, stage.name)
    return GrownCheckpoint(source, plan, _manifest(source, run, stage_index)), plan


def check_boundary(run: RunConfig, stage_index: int) -> None:
    """All that can be said about a growth from the run file alone, for use before anything starts.

    Raises:
        RequestError: the growth cannot be done as asked.
    """
    if stage_index < 1:
        return
    stage, before = run.stages[stage_index], run.stages[stage_index - 1]
    check_epsilons(run)
    plan = _unmeasured_plan(before.model, run, stage, stage_growth(stage, run.data.sequence_length))
    check_masks_reach_norms(stage, plan.masked)
    if plan.masked:
        check_mask_length(stage, plan.mask_steps, run.data.sequence_length)


def needs_distances(run: RunConfig, stage_index: int) -> bool:
    """Whether layers are to be chosen by measured distance."""
    stage, before = run.stages[stage_index], run.stages[stage_index - 1]
    by_distance = (stage.growth or GrowthConfig()).layer_selection == "distance"
    return by_distance and stage.model.num_layers != before.model.num_layers


def source_model(source: LogicalCheckpoint, run: RunConfig, stage_index: int) -> ModelConfig:
    """The model that `source` was trained as: its manifest has the last word, for growth derives norm_epsilon."""
    model = manifest_model(source.manifest) or run.stages[stage_index - 1].model
    if not model.vocab_size:
        raise RequestError(f"stage {run.stages[stage_index - 1].name!r}: model.vocab_size is not known: set it")
    return model


def manifest_model(manifest: Mapping[str, Any]) -> ModelConfig | None:
    """The model of the stage a manifest is of; none where it names no run."""
    stages = (manifest.get("run") or {}).get("stages", [])
    found = next((s["model"] for s in stages if s["name"] == manifest.get("stage")), None)
    return None if found is None else ModelConfig(**found)


def saved_plan(manifest: Mapping[str, Any]) -> GrowthPlan | None:
    """The plan of the growth that a checkpoint's stage began with; none if it did not grow."""
    growth = manifest.get("growth")
    return GrowthPlan.from_json(growth["plan"]) if growth else None


def resumed_plan(run: RunConfig, index: int, saved: Mapping[str, Any]) -> GrowthPlan | None:
    """The plan that the stage of a checkpoint was grown with, held against the one that the run file now asks for.

    Raises:
        RequestError: they differ; the message names the first difference.
    """
    plan, stage = saved_plan(saved), run.stages[index]
    if plan is None:
        return None
    growth = stage.growth or GrowthConfig()
    if growth.mask_steps is None:  # a share of the stage as long as it was then
        growth = replace(growth, mask_steps=plan.mask_steps)
    now = _unmeasured_plan(plan.old, run, stage, growth)
    if growth.layer_selection == "distance":  # measured at the boundary, not again
        now = replace(now, layer_sources=plan.layer_sources)
    check_same_plan(plan, now)
    return plan


def _unmeasured_plan(old: ModelConfig, run: RunConfig, stage: StageConfig, growth: GrowthConfig) -> GrowthPlan:
    """The plan but for which layers are copied, where that is measured."""
    return make_plan(old, stage.model, growth, run.seed, [0.0] * old.num_layers, stage.name)


def saved_mask_value(manifest: Mapping[str, Any]) -> float:
    """How far the masks of a checkpoint are open: 1 where it has none."""
    plan = saved_plan(manifest)
    return mask_value(plan, manifest.get("step") or 0) if plan is not None and plan.masked else 1.0


def check_masks_open(manifest: Mapping[str, Any]) -> None:
    """A checkpoint in the middle of a growth mask does not grow again.

    Raises:
        RequestError: its masks are not fully open.
    """
    plan, v = saved_plan(manifest), saved_mask_value(manifest)
    if plan is not None and v < 1:
        raise RequestError(
            f"the checkpoint of stage {manifest.get('stage')!r} is at step {manifest.get('step')}, in the middle of "
            f"its growth mask (v = {v:.3f}, open at step {plan.mask_steps}): train the stage to that step first"
        )


def check_same_tokenizer(manifest: Mapping[str, Any], run: RunConfig) -> None:
    """Both runs tokenize alike, as far as their tokenizer files can be read and compared.

    Raises:
        RequestError: the two files differ.
    """
    before = (manifest.get("run") or {}).get("tokenizer")
    if before and run.tokenizer and before != run.tokenizer and _differ(before, run.tokenizer):
        raise RequestError(
            f"the checkpoint was trained with tokenizer {before}, and the run file gives another one, {run.tokenizer}: "
            "growth keeps the tokenizer"
        )


def _differ(first: str, second: str) -> bool:
    """Whether two files are there and hold different bytes."""
    try:
        with open(first, "rb") as one, open(second, "rb") as two:
            return one.read() != two.read()
    except FileNotFoundError:
        return False


def _manifest(source: LogicalCheckpoint, run: RunConfig, stage_index: int) -> dict[str, Any]:
    carried: dict[str, Any] = {
        key: source.manifest[key] for key in ("tokens", "samples", "optimizer_step") if key in source.manifest
    }
    return {**carried, "run": asdict(run), "stage": run.stages[stage_index].name, "step": 0}
