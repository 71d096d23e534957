"""A half-open growth mask multiplied into the weights, for programs that know no masks."""

from __future__ import annotations

from typing import Any

import torch

from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.boundary import check_masks_open, saved_mask_value, saved_plan
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import FC1, PROJECTION, QKV

FOLDABLE = {"ffn", "heads"}


def folded(source: LogicalCheckpoint, model: ModelConfig, fold: bool) -> LogicalCheckpoint:
    """`source` with its masks folded in if `fold`; refused without.

    Masks on feed-forward units and heads multiply what single rows (or columns) of weights put out, so they can be
    moved into these. A mask on the hidden size changes the norms, one on layers blends input and output: no weights
    do the same.

    Raises:
        RequestError: the masks are not fully open and folding was not asked for, or cannot be done.
    """
    plan = saved_plan(source.manifest)
    if not fold or plan is None:
        check_masks_open(source.manifest)
        return source
    v = saved_mask_value(source.manifest)
    if fixed := [dimension for dimension in plan.masked if dimension not in FOLDABLE]:
        raise RequestError(
            f"the growth mask on {' and '.join(fixed)} (v = {v:.3f}) cannot be folded into weights, only masks on ffn "
            f"and heads can: train the stage on to step {plan.mask_steps}, where masks are open"
        )
    return FoldedMask(source, _factors(plan, model, v))


class FoldedMask(LogicalCheckpoint):
    """Weights of `source` times factors along one axis: {name: (axis, factors along it)}; no optimizer state."""

    def __init__(self, source: LogicalCheckpoint, factors: dict[str, tuple[int, torch.Tensor]]) -> None:
        self.source, self.factors = source, factors
        self.manifest: dict[str, Any] = source.manifest
        self.tensors = {name: info for name, info in source.tensors.items() if not name.startswith(STATE_PREFIXES)}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of shape `region.sizes`; see `LogicalCheckpoint.read`."""
        region = region or Region.whole(self.tensors[name].shape)
        values = self.source.read(name, region)
        if name not in self.factors:
            return values
        axis, factors = self.factors[name]
        along = factors[region.slices[axis]].view(-1, *(1,) * (len(region.sizes) - axis - 1))
        return (values.float() * along).to(values.dtype)


def _factors(plan: GrowthPlan, model: ModelConfig, v: float) -> dict[str, tuple[int, torch.Tensor]]:
    factors: dict[str, tuple[int, torch.Tensor]] = {}
    kinds = ("weight", "bias") if model.bias else ("weight",)
    if "ffn" in plan.masked:
        units = torch.ones(model.ffn_hidden_size)
        units[plan.old.ffn_hidden_size :] = v
        rows = units.repeat(2 if model.gated else 1)
        factors |= {f"{FC1}.{kind}": (1, rows) for kind in kinds}
    if "heads" in plan.masked:
        rows, columns = _head_factors(plan, model, v)
        factors |= {f"{QKV}.{kind}": (1, rows) for kind in kinds}
        factors[f"{PROJECTION}.weight"] = (2, columns)
    return factors


def _head_factors(plan: GrowthPlan, model: ModelConfig, v: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors on the rows of the query-key-value matrix and on the columns of the projection.

    Queries of new heads and everything of new groups are times v; what new heads of old groups put out, too, because
    their keys and values are old.
    """
    groups, per_group = model.query_groups, model.num_attention_heads // model.query_groups
    old_groups, old_per_group = plan.old.query_groups, plan.old.num_attention_heads // plan.old.query_groups
    rows, columns = torch.ones(groups, per_group + 2), torch.ones(groups, per_group)
    rows[old_groups:] = v
    rows[:, old_per_group:per_group] = v
    columns[:old_groups, old_per_group:] = v
    channels = model.kv_channels
    return rows.flatten().repeat_interleave(channels), columns.flatten().repeat_interleave(channels)
