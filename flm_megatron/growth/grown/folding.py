"""A half-open growth mask multiplied into the weights, for programs that know no masks."""

from __future__ import annotations

import torch

from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.boundary import check_masks_open, saved_mask_value, saved_opening, saved_plan
from flm_megatron.growth.opening import OpeningMasks
from flm_megatron.model.mask_plan import MaskPlan
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
    opening, plan = saved_opening(source.manifest), saved_plan(source.manifest)
    if not fold or plan is None:
        check_masks_open(source.manifest)
        return source
    step = source.manifest.position.step or 0
    for masks in opening:
        if fixed := [dimension for dimension in masks.masks.dimensions if dimension not in FOLDABLE.values()]:
            raise RequestError(
                f"the growth mask on {' and '.join(fixed)} (v = {masks.value(0):.3f}) cannot be folded into weights, "
                f"only masks on ffn and heads can: train the stage on to step {step + masks.left}, where masks are open"
            )
    return FoldedMask(source, {k: v for masks in opening for k, v in _factors(plan.new, masks).items()})


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


def _factors(model: ModelConfig, opening: OpeningMasks) -> dict[str, tuple[int, torch.Tensor]]:
    return {
        name: (number, _along(axis, model, opening))
        for name, spec in parameter_specs(model).items()
        for number, axis in enumerate(spec.axes)
        if _is_masked(opening.masks, axis)
    }


def _is_masked(masks: MaskPlan, axis: Axis) -> bool:
    """Whether a mask applies along this axis: where feed-forward units and heads are read.

    Where each module of a path masks it, that is what gives feed-forward units and heads, and, of new heads in old
    groups, whose keys and values are old, what reads them too.
    """
    if FOLDABLE.get(axis.unit) not in masks.dimensions:
        return False
    if masks.paths == "once":
        return axis.side == "in"
    return axis.side == "out" or axis.unit is Unit.HEAD


def _along(axis: Axis, model: ModelConfig, opening: OpeningMasks) -> torch.Tensor:
    """Factors along an axis of the grown model: v at new indices, 1 at old ones."""
    masks, v = opening.masks, opening.value(0)
    old_groups, old = axis.groups, masks.ffn or 0
    if axis.unit is Unit.HEAD and masks.heads:
        old_groups, old = masks.heads[0], masks.heads[1] * model.kv_channels
    factors, start = torch.ones(axis.groups, axis.group_size), 0
    for band in axis.bands:
        if band.name not in ("key", "value"):
            factors[:, start + old : start + band.size] = v
        start += band.size
    # Where each module of a path masks it, values of new groups are masked where they come from.
    factors[old_groups:] = 1 if (masks.paths, axis.side) == ("each", "in") else v
    return factors.flatten()
