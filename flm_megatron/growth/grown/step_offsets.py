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
from flm_megatron.growth.record import ChangeRecord, GrowthRecord, ShrinkRecord, change_behind
from flm_megatron.growth.shrink.gather import Gather, gather


def has_moments(checkpoint: LogicalCheckpoint) -> bool:
    """Whether a checkpoint has Adam's moments; without, all entries count from 0."""
    return any(name.startswith(EXP_AVG) for name in checkpoint.tensors)


def carries_moments(source: LogicalCheckpoint, plan: GrowthPlan) -> bool:
    """Whether a growth goes on with any moments of its source; else Adam begins at step 0."""
    return has_moments(source) and plan.optimizer_state != "reset_all"


def earlier_growth(checkpoint: LogicalCheckpoint, changes: bool) -> RecordedGrowth | None:
    """What the manifests of a stage that starts from or resumes `checkpoint` keep of its growth.

    The growth or shrinking that its step offsets follow from, if it has any; nothing if the stage `changes` its shape
    itself.
    """
    growth = change_behind(checkpoint.manifest)
    if growth is None or changes or not has_moments(checkpoint) or not has_step_offsets(growth):
        return None
    return growth.recorded()


def has_step_offsets(change: ChangeRecord | None) -> bool:
    """Whether any growth behind a checkpoint asked for step offsets (`optimizer_step: birth`)."""
    if change is None:
        return False
    asked = isinstance(change, GrowthRecord) and change.plan.optimizer_step == "birth"
    return asked or has_step_offsets(change.before)


def step_offsets(change: ChangeRecord | None, name: str, region: Region) -> torch.Tensor:
    """Adam's step at which each entry was added, of a region of parameter `name` (int32, of shape `region.sizes`).

    It is 0 for entries of the first stage, for those of growths that `keep` the step, and for all where a change of
    shape went on with no moments. Copies that have the moments of their source have its offset, and so have the entries
    that a shrinking keeps.
    """
    if isinstance(change, ShrinkRecord) and change.moments:
        before = change.before
        kept = Gather(change.plan)
        return gather(kept, name, region, torch.int32, lambda part: part.pick(step_offsets(before, name, part.source)))
    out = torch.zeros(region.sizes, dtype=torch.int32)
    if not isinstance(change, GrowthRecord) or not change.moments:
        return out
    added_at: torch.Tensor | int = change.optimizer_step if change.plan.optimizer_step == "birth" else 0
    for filled in Operators(change.plan).regions(name, region):
        content, values = filled.content, added_at
        if isinstance(content, Old) and change.plan.keeps_moments(content.copy):
            values = step_offsets(change.before, name, content.region)
        out[filled.region.within(region).slices] = values
    return out
