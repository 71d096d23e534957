"""Growth as arithmetic on regions: cuts a region of a grown tensor into regions that each have one source.

`docs/growth.md` derives the rules. In short: old weights stay in the top-left block (times a scale where a norm or a
multiplier changes); new weights are drawn as for a fresh model of the new shape; under `zero`, new weights that would
write into old activations are zero instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from flm_megatron.checkpoint.logical import Region
from flm_megatron.growth.grown.axes import Segment, axis_segments
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import Axis, ParameterSpec, Unit, parameter_specs


@dataclass(frozen=True)
class Old:
    """Values of the old tensor's `region`, times `scale`; `copy` where the layer is a copy of its source."""

    region: Region
    scale: float
    copy: bool


@dataclass(frozen=True)
class Mean:
    """The mean over `axis` of the old tensor's `region`, times `scale`; the same for every new index along that
    axis."""

    region: Region
    axis: int
    scale: float


@dataclass(frozen=True)
class Constant:
    """New values that are all equal."""

    value: float


@dataclass(frozen=True)
class Fresh:
    """Truncated normal values: a function of seed, tensor name and global index."""

    std: float


Content = Old | Mean | Constant | Fresh


@dataclass(frozen=True)
class FilledRegion:
    """A region of the grown tensor and what fills it."""

    region: Region
    content: Content


class Operators:
    """Says what fills each region of every tensor of one growth."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.specs = parameter_specs(plan.new)
        self._old_specs = parameter_specs(plan.old)

    def regions(self, name: str, region: Region) -> Iterator[FilledRegion]:
        """`region` of parameter `name` cut by what fills it: covered once, in row-major order of corners."""
        old, new = self._old_specs[name].axes, self.specs[name].axes
        axes = [
            [c for s in axis_segments(self.plan, before, after) if (c := s.clip(start, start + size))]
            for before, after, start, size in zip(old, new, region.offsets, region.sizes, strict=True)
        ]
        for segments in itertools.product(*axes):
            cut = Region(tuple(s.start for s in segments), tuple(s.size for s in segments))
            yield FilledRegion(cut, self._content(self.specs[name], segments))

    def scale(self, spec: ParameterSpec) -> float:
        """Factor on the old values of a parameter; its first moment takes 1 / scale, its second 1 / scale^2.

        `rejuvenate` scales what writes into the residual stream and what reads it; norms in between, whose outputs are
        divided by it, undo both.
        """
        sides = [axis.side for axis in spec.axes if axis.unit is Unit.HIDDEN]
        if not sides:
            return 1.0
        if None in sides:
            return (self.plan.norm_scale if spec.kind == "norm" else 1.0) / self.plan.rejuvenate
        multiplier = {"embedding": self.plan.embedding_scale, "head": self.plan.head_scale}.get(spec.kind, 1.0)
        return multiplier * self.plan.rejuvenate

    def _content(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Content:
        copy = any(s.copy for s in segments)
        if copy and self.plan.layers == "zero" and _writes_residual(spec):
            return Constant(0.0)
        if copy and self.plan.layers == "random":
            return self._drawn(spec)
        new = [axis for axis, segment in zip(spec.axes, segments, strict=True) if segment.source is None]
        if not new:
            source = Region(tuple(s.source or 0 for s in segments), tuple(s.size for s in segments))
            return Old(source, self.scale(spec), copy)
        if any(self._is_zero(axis) for axis in new):
            return Constant(0.0)
        if self.plan.hidden == "zero" and any((axis.unit, axis.side) == (Unit.HIDDEN, "out") for axis in new):
            return self._zero_hidden(spec, segments)
        return self._drawn(spec)

    def _drawn(self, spec: ParameterSpec) -> Content:
        """What a fresh model of the new shape has; norm weights on the scale of the old ones, if that is below 1."""
        return Fresh(spec.init_std) if spec.init_std else Constant(spec.init_mean * min(1.0, self.scale(spec)))

    def _is_zero(self, axis: Axis) -> bool:
        """Whether new indices of this axis are outgoing weights of new heads or feed-forward units under `zero`."""
        operator = {Unit.HEAD: self.plan.heads, Unit.FFN: self.plan.ffn}.get(axis.unit)
        return axis.side == "in" and operator == "zero"

    def _zero_hidden(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Content:
        """What writes into new hidden channels: zero; under LayerNorm the mean of the old channels.

        LayerNorm subtracts the mean over all channels: new channels that hold the old mean leave it unchanged and are
        zero after the subtraction. RMSNorm subtracts nothing.
        """
        axis = spec.find(Unit.HIDDEN, "out")
        assert axis is not None
        others_old = all(s.source is not None for i, s in enumerate(segments) if i != axis)
        if self.plan.old.normalization == "rmsnorm" or not others_old:
            return Constant(0.0)
        offsets, sizes = [s.source or 0 for s in segments], [s.size for s in segments]
        sizes[axis] = self.plan.old.hidden_size
        return Mean(Region(tuple(offsets), tuple(sizes)), axis, self.scale(spec))


def _writes_residual(spec: ParameterSpec) -> bool:
    """Whether it writes a layer's output into the residual stream: zero in a copied layer under `zero`."""
    return spec.stacked and spec.find(Unit.HIDDEN, "out") is not None
