"""From a finished stage to the next: rules, plan and grown checkpoint in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.own_tokenizer import check_tokenizer
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.config.loader import resolve_vocabulary
from flm_megatron.config.schema import GrowthConfig, ModelConfig, RunConfig
from flm_megatron.data.tokenizer import open_tokenizer, tokenizer_exists
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError
from flm_megatron.growth.change import VERB, Change, check_same_plan
from flm_megatron.growth.foreseen import check_boundary, check_masks, unmeasured_plan
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.grown.step_offsets import carries_moments
from flm_megatron.growth.opening import OpeningMasks
from flm_megatron.growth.plan import GrowthPlan, TrainedScale, make_plan, stage_growth
from flm_megatron.growth.record import growth_of
from flm_megatron.growth.rules import check_source_stage
from flm_megatron.growth.schedule import still_opening
from flm_megatron.growth.trained_scale import trained_scale


def grown_checkpoint(
    source: LogicalCheckpoint,
    run: RunConfig,
    stage_index: int,
    distances: Sequence[float] | None = None,
    trained: TrainedScale | None = None,
) -> tuple[GrownCheckpoint, GrowthPlan]:
    """Stage `stage_index` of `run` as it starts: `source`, the checkpoint of the stage before, grown.

    `distances` (one per old layer) are needed where `needs_distances` says so, `trained` (see `boundary_scale`) to read
    new entries that start beside trained ones. The checkpoint's manifest is that of the
    new stage at step 0, with tokens, samples and Adam's step carried over. Nothing is read from `source` yet.

    Raises:
        RequestError: the growth cannot be done as asked.
    """
    check_boundary(run, stage_index)
    stage = run.stages[stage_index]
    check_source_stage(run, stage_index, source.manifest.position.stage)
    old = source_model(source, run, stage_index)
    check_same_tokenizer(source.manifest, run, old)
    growth = stage_growth(stage, run.data.sequence_length)
    plan = make_plan(old, stage.model, growth, run.seed, distances, stage.name, trained)
    plan = replace(plan, earlier_masks=saved_opening(source.manifest))
    check_masks(run, stage_index, plan)
    manifest = changed_manifest(source, run, stage_index, plan.new, carries_moments(source, plan))
    return GrownCheckpoint(source, plan, manifest), plan


def needs_distances(run: RunConfig, stage_index: int) -> bool:
    """Whether layers are to be chosen by measured distance, out of more than one."""
    stage, before = run.stages[stage_index], run.stages[stage_index - 1]
    by_distance = (stage.growth or GrowthConfig()).selection == "distance"
    return by_distance and 1 < before.model.num_layers != stage.model.num_layers


def boundary_scale(
    source: LogicalCheckpoint, run: RunConfig, stage_index: int, processes: Callable[[], Processes]
) -> TrainedScale | None:
    """How large the trained weights and moments are that new entries start beside; see `trained_scale`.

    None, and no `processes` are made, where the growth does not look at them.
    """
    growth = run.stages[stage_index].growth or GrowthConfig()
    if growth.new_scale == "init" and growth.optimizer_state != "grow":
        return None
    return trained_scale(source, source_model(source, run, stage_index), growth, processes())


def source_model(source: LogicalCheckpoint, run: RunConfig, stage_index: int) -> ModelConfig:
    """The model that `source` was trained as: the one it records, else the run file's."""
    before = run.stages[stage_index - 1].model
    model = recorded_model(source, before.vocab_size) or before
    if not model.vocab_size:
        raise RequestError(f"stage {run.stages[stage_index - 1].name!r}: model.vocab_size is not known: set it")
    return model


def saved_plan(manifest: Manifest) -> GrowthPlan | None:
    """The plan of the growth that a checkpoint's stage began with; none if it did not grow."""
    growth = growth_of(manifest)
    return growth.plan if growth else None


def resumed_plan(run: RunConfig, index: int, saved: Manifest) -> GrowthPlan | None:
    """The plan that the stage of a checkpoint was grown with, compared with the plan of this run file.

    Raises:
        RequestError: they differ; the message names the first difference.
    """
    plan, stage = saved_plan(saved), run.stages[index]
    if plan is None:
        return None
    growth = stage.growth or GrowthConfig()
    if growth.mask_steps is None:  # a share of the stage as long as it was then
        growth = replace(growth, mask_steps=plan.mask_steps)
    now = unmeasured_plan(plan.old, run, stage, growth)
    now = replace(now, masked_paths=plan.masked_paths, earlier_masks=plan.earlier_masks)
    now = replace(now, trained=plan.trained)  # measured at the boundary, not again
    if growth.selection == "distance":  # likewise
        now = replace(now, layer_sources=plan.layer_sources)
    check_same_plan(plan, now)
    return plan


def saved_opening(manifest: Manifest) -> tuple[OpeningMasks, ...]:
    """The masks of a checkpoint that are not fully open, as a stage that begins from it has them."""
    plan = saved_plan(manifest)
    return still_opening(plan, manifest.position.step or 0) if plan is not None else ()


def saved_mask_value(manifest: Manifest) -> float:
    """How far the masks of a checkpoint are open that are least so: 1 where it has none."""
    return min((masks.value(0) for masks in saved_opening(manifest)), default=1.0)


def check_masks_open(manifest: Manifest) -> None:
    """Refuse a checkpoint whose growth masks are not fully open.

    Raises:
        RequestError: its masks are not fully open.
    """
    if opening := saved_opening(manifest):
        at, left = manifest.position, max(masks.left for masks in opening)
        raise RequestError(
            f"the checkpoint of stage {at.stage!r} is at step {at.step}, in the middle of its growth mask "
            f"(v = {saved_mask_value(manifest):.3f}, open at step {(at.step or 0) + left}): train the stage to that "
            "step first"
        )


def masks_as_saved(chunks: Sequence[nn.Module], model: ModelConfig, manifest: Manifest) -> None:
    """Put the masks of a checkpoint on the built `model`, as far open as they were."""
    from flm_megatron.model.masks import GrowthMasks

    for masks in saved_opening(manifest):
        GrowthMasks(chunks, model, masks.masks).set(masks.value(0))


def check_same_tokenizer(manifest: Manifest, run: RunConfig, model: ModelConfig, change: Change = "growth") -> None:
    """Check that the checkpoint, of `model`, was trained with the run's tokenizer, as far as both are known.

    Raises:
        RequestError: it is another one.
    """
    if run.tokenizer is None or not tokenizer_exists(run.tokenizer):
        return
    try:
        check_tokenizer(open_tokenizer(run.tokenizer), model, f"the checkpoint to {VERB[change]}", manifest)
    except RequestError as error:
        raise RequestError(f"{error}; {change} keeps the tokenizer") from None


def changed_manifest(
    source: LogicalCheckpoint, run: RunConfig, stage_index: int, model: ModelConfig, moments: bool
) -> Manifest:
    """The manifest of a stage of another shape, `model`, at step 0, with the run's position carried over, and Adam's
    step where the `moments` go on."""
    known = source.manifest
    at = known.position
    position = StagePosition(0, at.samples, at.tokens, at.optimizer_step if moments else 0)
    run = resolve_vocabulary(run, int(model.vocab_size or 0))
    carried = Manifest(tokenizer_sha256=known.tokenizer_sha256, history=known.history)
    return carried | stage_manifest(run, stage_index, model, position)
