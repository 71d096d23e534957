"""A half-open growth mask multiplied into the weights, for programs that know no masks."""

from __future__ import annotations

import torch

from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region
from flm_megatron.errors import RequestError
from flm_megatron.growth.boundary import check_masks_open, saved_mask_value, saved_plan
from flm_megatron.growth.grown.axes import axis_segments
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import Axis, Unit, parameter_specs

FOLDABLE = {Unit.FFN: "ffn", Unit.HEAD: "heads"}


def folded(source: LogicalCheckpoint, fold: bool) -> LogicalCheckpoint:
    """`source` with its masks folded in if `fold`, else refused.

    Masks on feed-forward units and heads scale what single columns of weights read (or what single rows give), so the
    weights can take them up. A mask on the hidden size changes the norms and one on layers blends input and output,
    which no weights can do.

    Raises:
        RequestError: the masks are not fully open and folding was not asked for, or cannot be done.
    """
    plan = saved_plan(source.manifest)
    if not fold or plan is None:
        check_masks_open(source.manifest)
        return source
    v = saved_mask_value(source.manifest)
    if fixed := [dimension for dimension in plan.masked if dimension not in FOLDABLE.values()]:
        raise RequestError(
            f"the growth mask on {' and '.join(fixed)} (v = {v:.3f}) cannot be folded into weights, only masks on ffn "
            f"and heads can: train the stage on to step {plan.mask_steps}, where masks are open"
        )
    return FoldedMask(source, _factors(plan, v))


def without_mask(source: LogicalCheckpoint, fold: bool) -> LogicalCheckpoint:
    """The source itself if it has no masks or they are open, else `folded`. Raises RequestError as that does."""
    return source if saved_mask_value(source.manifest) == 1 else folded(source, fold)


class FoldedMask(LogicalCheckpoint):
    """Weights of `source` times factors along one axis: {name: (axis, factors)}; no optimizer state."""

    def __init__(self, source: LogicalCheckpoint, factors: dict[str, tuple[int, torch.Tensor]]) -> None:
        self.source, self.factors = source, factors
        self.manifest = source.manifest
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


def _factors(plan: GrowthPlan, v: float) -> dict[str, tuple[int, torch.Tensor]]:
    old = parameter_specs(plan.old)
    return {
        name: (number, _along(plan, old[name].axes[number], axis, v))
        for name, spec in parameter_specs(plan.new).items()
        for number, axis in enumerate(spec.axes)
        if _is_masked(plan, axis)
    }


def _is_masked(plan: GrowthPlan, axis: Axis) -> bool:
    """Whether a mask of the plan applies along this axis: where feed-forward units and heads are read.

    Where each module of a path masks it, that is what gives feed-forward units and heads, and, of new heads in old
    groups, whose keys and values are old, what reads them too.
    """
    if FOLDABLE.get(axis.unit) not in plan.masked:
        return False
    if plan.masked_paths == "once":
        return axis.side == "in"
    return axis.side == "out" or axis.unit is Unit.HEAD


def _along(plan: GrowthPlan, old: Axis, new: Axis, v: float) -> torch.Tensor:
    """Factors along a grown axis: v at new indices, 1 at old ones."""
    factors = torch.ones(new.size)
    for segment in axis_segments(plan, old, new):
        if segment.source is None:
            factors[segment.start : segment.start + segment.size] = v
    if plan.masked_paths == "each" and new.side == "in":
        factors[old.groups * new.group_size :] = 1  # values of new groups are masked where they come from
    return factors
