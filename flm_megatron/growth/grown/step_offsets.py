"""Adam's step at which each entry of a grown model was added, its step offset: it follows from the growths so far.

Offsets are not stored: the plans in a checkpoint's manifest say which regions a growth added, so each rank computes
those of its shard.
"""

from __future__ import annotations

import torch

from flm_megatron.checkpoint.logical import EXP_AVG, LogicalCheckpoint, Region
from flm_megatron.checkpoint.manifest import RecordedGrowth
from flm_megatron.growth.grown.operators import Old, Operators
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.record import GrowthRecord, growth_behind


def has_moments(checkpoint: LogicalCheckpoint) -> bool:
    """Whether a checkpoint has Adam's moments; without, all entries count from 0."""
    return any(name.startswith(EXP_AVG) for name in checkpoint.tensors)


def carries_moments(source: LogicalCheckpoint, plan: GrowthPlan) -> bool:
    """Whether a growth goes on with any moments of its source; else Adam begins at step 0."""
    return has_moments(source) and plan.optimizer_state != "reset_all"


def earlier_growth(checkpoint: LogicalCheckpoint, grows: bool) -> RecordedGrowth | None:
    """What the manifests of a stage that starts from or resumes `checkpoint` keep of its growth.

    The growth that its step offsets follow from, if it has any; nothing if the stage `grows` itself.
    """
    growth = growth_behind(checkpoint.manifest)
    if growth is None or grows or not has_moments(checkpoint) or not has_step_offsets(growth):
        return None
    return growth.recorded()


def has_step_offsets(growth: GrowthRecord | None) -> bool:
    """Whether any growth behind a checkpoint asked for step offsets (`optimizer_step: birth`)."""
    return growth is not None and (growth.plan.optimizer_step == "birth" or has_step_offsets(growth.before))


def step_offsets(growth: GrowthRecord | None, name: str, region: Region) -> torch.Tensor:
    """Adam's step at which each entry was added, of a region of parameter `name` (int32, of shape `region.sizes`).

    It is 0 for entries of the first stage, for those of growths that `keep` the step, and for all where a growth went
    on with no moments. Copies that have the moments of their source have its offset.
    """
    out = torch.zeros(region.sizes, dtype=torch.int32)
    if growth is None or not growth.moments:
        return out
    added_at: torch.Tensor | int = growth.optimizer_step if growth.plan.optimizer_step == "birth" else 0
    for filled in Operators(growth.plan).regions(name, region):
        content, values = filled.content, added_at
        if isinstance(content, Old) and growth.plan.keeps_moments(content.copy):
            values = step_offsets(growth.before, name, content.region)
        out[filled.region.within(region).slices] = values
    return out
