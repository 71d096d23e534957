"""How far growth masks are open: a function of the plan and the stage's step, so it need not be saved."""

from __future__ import annotations

import math

from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.mask_plan import MaskPlan


def mask_value(plan: GrowthPlan, step: int) -> float:
    """v in [0, 1] for the forward pass after `step` steps of the stage: 0 at the first, 1 from `mask_steps` on."""
    if step >= plan.mask_steps:
        return 1.0
    progress = max(step, 0) / plan.mask_steps
    return progress if plan.mask_shape == "linear" else (1 - math.cos(math.pi * progress)) / 2


def mask_plan(plan: GrowthPlan) -> MaskPlan:
    """What the model masks under a growth plan."""
    old, masked = plan.old, plan.masked
    return MaskPlan(
        hidden=old.hidden_size if "hidden" in masked else None,
        ffn=old.ffn_hidden_size if "ffn" in masked else None,
        heads=(old.query_groups, old.num_attention_heads // old.query_groups) if "heads" in masked else None,
        layers=tuple(i for i, s in enumerate(plan.layer_sources) if s.copy) if "layers" in masked else (),
        paths=plan.masked_paths,
    )
