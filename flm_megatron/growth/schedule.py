"""How far the growth masks of a stage are open, its own and those of earlier growths that were not open before it; how
much faster it learns at first. All are functions of its step, so nothing is saved."""

from __future__ import annotations

from flm_megatron.config.schema import GrowthConfig
from flm_megatron.growth.opening import OpeningMasks
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.mask_plan import MaskPlan


def all_masks(plan: GrowthPlan) -> tuple[OpeningMasks, ...]:
    """The masks of a stage that began with this growth, each of other dimensions."""
    own = OpeningMasks(plan.stage, mask_plan(plan), plan.mask_steps, plan.mask_shape)
    return (*plan.earlier_masks, *((own,) if own.masks else ()))


def still_opening(plan: GrowthPlan, step: int) -> tuple[OpeningMasks, ...]:
    """Those that are not open after `step` steps of the stage, as a stage that begins then has them."""
    return tuple(masks.after(step) for masks in all_masks(plan) if masks.value(step) < 1)


def mask_value(plan: GrowthPlan, step: int) -> float:
    """v of the masks that are least open for the forward pass after `step` steps of the stage; 1 if all are open."""
    return min((masks.value(step) for masks in all_masks(plan)), default=1.0)


def lr_multipliers(growth: GrowthConfig, plan: GrowthPlan, step: int) -> tuple[float, float]:
    """Factors on the learning rate of all weights, and beside that of added ones, in the update after `step` steps.

    Both begin as `growth` says and go linearly to 1.
    """
    steps = multiplied_steps(growth, plan)
    left = max(0.0, 1 - step / steps) if steps else 0.0
    return 1 + (growth.lr_mult - 1) * left, 1 + (growth.new_lr_mult - 1) * left


def multiplied_steps(growth: GrowthConfig, plan: GrowthPlan) -> int:
    """Steps after which both factors are 1."""
    return plan.mask_steps if growth.lr_mult_steps is None else growth.lr_mult_steps


def mask_plan(plan: GrowthPlan) -> MaskPlan:
    """What the model masks of this growth."""
    old, masked = plan.old, plan.masked
    return MaskPlan(
        hidden=old.hidden_size if "hidden" in masked else None,
        ffn=old.ffn_hidden_size if "ffn" in masked else None,
        heads=(old.query_groups, old.num_attention_heads // old.query_groups) if "heads" in masked else None,
        layers=tuple(i for i, s in enumerate(plan.layer_sources) if s.copy) if "layers" in masked else (),
        paths=plan.masked_paths,
    )
