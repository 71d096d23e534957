"""Adam's step at which each entry of a grown model was added, its step offset: it follows from the growths so far.

Offsets are not stored: the plans in a checkpoint's manifest say which regions a growth added, so each rank computes
those of its shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flm_megatron.checkpoint.logical import EXP_AVG, LogicalCheckpoint, Region
from flm_megatron.checkpoint.manifest import RecordedGrowth
from flm_megatron.engine.types import ModelChunk, Optimizer
from flm_megatron.errors import RequestError
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


def load_step_offsets(checkpoint: LogicalCheckpoint, chunks: Sequence[ModelChunk], optimizer: Optimizer) -> None:
    """Set the step offsets of a loaded optimizer's AdamW, unless all are 0.

    Call it after `load_state`, with the same checkpoint. Without moments in the checkpoint Adam starts anew, from
    offset 0.

    Raises:
        RequestError: a growth asked for step offsets, but the optimizer is Transformer Engine's or Apex's.
    """
    from flm_megatron.checkpoint.sharding.optimizer_state import (
        part_slices,
        placements_by_parameter,
        state_regions,
    )
    from flm_megatron.checkpoint.sharding.placement import placements
    from flm_megatron.engine.optimizer import parts
    from flm_megatron.optim.adamw import AdamW

    growth = growth_behind(checkpoint.manifest)
    if not has_moments(checkpoint) or not has_step_offsets(growth):
        return
    by_parameter = placements_by_parameter(placements(chunks))
    for part in parts(optimizer):
        inner = part.optimizer
        if not isinstance(inner, AdamW):
            kind = f"{type(inner).__module__}.{type(inner).__name__}"
            raise RequestError(
                f"growth.optimizer_step is `birth`, which {kind} cannot count: use `keep` with a re-warm-up, "
                "or train without Transformer Engine and Apex"
            )
        masters = {_memory(p): p for group in inner.param_groups for p in group["params"] if p.numel()}
        for state in part_slices(part):
            values = torch.zeros(state.master.shape, dtype=torch.int32)
            for held in state_regions(state, by_parameter):
                held.values(values).copy_(step_offsets(growth, held.placement.name, held.region))
            if values.any():
                master = masters[_memory(state.master)]
                inner.state[master]["step_offset"] = values.view(master.shape).to(master.device)


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells where a tensor's values are, whether it has values or not."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
