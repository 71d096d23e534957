"""Growth as arithmetic on regions: cuts a region of a grown tensor into regions that each have one source.

`docs/growth.md` derives the rules. In short: old weights stay in the top-left block (times a scale where a norm or a
multiplier changes); new weights are drawn as for a fresh model of the new shape; under `zero`, new weights that would
write into old activations are zero instead; under `clone`, new units are copies of old ones, whose readers share;
under `shrink`, a fresh model is added to the shrunk old one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from flm_megatron.checkpoint.logical import Region
from flm_megatron.growth.grown.axes import Segment, segments_within, tensor_segments
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model.parameters import Axis, ParameterSpec, Unit, parameter_specs


@dataclass(frozen=True)
class Noise:
    """Truncated normal values as those of `region` of the grown tensor; a negative `std` turns their signs."""

    region: Region
    std: float


@dataclass(frozen=True)
class Old:
    """Values of the old tensor's `region`, times `scale`, plus `noise`.

    `copy` where they are a copy of what stands elsewhere too. `gradient_ratio` is the gradient of the old weight over
    that of the new one.
    """

    region: Region
    scale: float
    copy: bool
    gradient_ratio: float
    noise: Noise | None = None


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
    """A region of the grown tensor and what fills it; `exp_avg_sq` is what entries without moments of their own get."""

    region: Region
    content: Content
    exp_avg_sq: float = 0.0


class Operators:
    """Says what fills each region of every tensor of one growth."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.specs = parameter_specs(plan.new)
        self._old_specs = parameter_specs(plan.old)
        self._segments: dict[str, list[list[Segment]]] = {}
        """Those of each whole tensor, by name: worked out once, for a large model has many regions."""

    def regions(self, name: str, region: Region) -> Iterator[FilledRegion]:
        """`region` of parameter `name` cut by what fills it: covered once, in row-major order of corners."""
        spec = self.specs[name]
        if name not in self._segments:
            self._segments[name] = tensor_segments(self.plan, self._old_specs.get(name), spec)
        axes = segments_within(self._segments[name], region)
        if spec.stacked and self.plan.looks_at_trained:
            axes[0] = [layer for s in axes[0] for i in range(s.size) if (layer := s.clip(s.start + i, s.start + i + 1))]
        for segments in itertools.product(*axes):
            cut = Region(tuple(s.start for s in segments), tuple(s.size for s in segments))
            yield FilledRegion(cut, self._content(spec, segments), self._exp_avg_sq(spec, segments))

    def scale(self, spec: ParameterSpec) -> float:
        """Factor on the old values of a parameter that are not cloned.

        `rejuvenate` scales what writes into the residual stream and what reads it; norms in between, whose outputs are
        divided by it, undo both.
        """
        sides = [axis.side for axis in spec.axes if axis.unit is Unit.HIDDEN]
        if not sides:
            return 1.0
        multiplier = self.plan.multiplier_scale(spec)
        if None in sides:
            return multiplier * (self.plan.norm_scale if spec.kind == "norm" else 1.0) / self.plan.rejuvenate
        return multiplier * self.plan.rejuvenate

    def _content(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Content:
        if spec.stacked and segments[0].copy:
            if segments[0].source is None:
                return self._new_layer(spec, segments)
            if self.plan.layers == "zero" and _writes_residual(spec):
                return Constant(0.0)
        new = [axis for axis, segment in zip(spec.axes, segments, strict=True) if segment.source is None]
        if not new:
            return self._old(spec, segments)
        if any(self._is_zero(axis) for axis in new):
            return Constant(0.0)
        if self.plan.hidden == "zero" and any((axis.unit, axis.side) == (Unit.HIDDEN, "out") for axis in new):
            return self._zero_hidden(spec, segments)
        return self._drawn(spec, segments)

    def _old(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Old:
        """Old values: what reads n copies of a unit takes 1/n of its weight from each, and each gets 1/n of the
        gradient."""
        region = Region(tuple(s.source or 0 for s in segments), tuple(s.size for s in segments))
        shrink = self.plan.shrink if self.plan.shrink and spec.init_std else 1.0
        scale = self.scale(spec) * shrink / _copies_read(spec, segments)
        copy, noise = any(s.copy for s in segments), self._noise(spec, segments)
        return Old(region, scale, copy, self._gradient_ratio(spec, segments), noise)

    def _gradient_ratio(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> float:
        """The gradient of an old weight over that of the new one: copies of a unit share it."""
        return self.scale(spec) * (math.prod(s.copies for s in segments) // _copies_read(spec, segments))

    def _exp_avg_sq(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> float:
        """Under `grow` the mean second moment of the old entries beside, else 0."""
        if self.plan.optimizer_state != "grow":
            return 0.0
        found = self.plan.trained.exp_avg_sq_of(spec.name, _old_layer(spec, segments))
        return found / self._gradient_ratio(spec, segments) ** 2

    def _noise(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Noise | None:
        """Noise on what reads a cloned unit, which cancels over its copies; under `shrink` a fresh matrix."""
        if self.plan.shrink and spec.init_std:
            return Noise(Region(tuple(s.start for s in segments), tuple(s.size for s in segments)), spec.init_std)
        axis = next((i for i, axis in enumerate(spec.axes) if axis.side == "in"), None)
        if not self.plan.clone_noise or axis is None or segments[axis].noise is None:
            return None
        offsets = [s.start for s in segments]
        sign = 1 if segments[axis].noise == offsets[axis] else -1
        offsets[axis] = segments[axis].noise or 0
        std = sign * self.plan.clone_noise * spec.init_std
        return Noise(Region(tuple(offsets), tuple(s.size for s in segments)), std)

    def _new_layer(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Content:
        """What a layer has that is no copy."""
        zero = self.plan.layers == "zero" and _writes_residual(spec)
        return Constant(0.0) if zero else self._drawn(spec, segments)

    def _drawn(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Content:
        """What a fresh model of the new shape has, or random values as large as the old ones beside.

        Norm weights are on the scale of the old ones, if that is below 1.
        """
        if not spec.init_std:
            return Constant(spec.init_mean * min(1.0, self.scale(spec)))
        if self.plan.new_scale == "init" or spec.name not in self._old_specs:
            return Fresh(spec.init_std)
        rms = self.plan.trained.rms_of(spec.name, _old_layer(spec, segments))
        return Fresh(rms * self.scale(spec) / _copies_read(spec, segments))

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
        return Mean(Region(tuple(offsets), tuple(sizes)), axis, self.scale(spec) / _copies_read(spec, segments))


def _old_layer(spec: ParameterSpec, segments: tuple[Segment, ...]) -> int | None:
    """The old layer that a region belongs to, 0 where there are no layers; none for a layer without a source."""
    return segments[0].source if spec.stacked else 0


def _copies_read(spec: ParameterSpec, segments: tuple[Segment, ...]) -> int:
    """How many copies of each unit the inputs of a matrix hold."""
    return math.prod(s.copies for axis, s in zip(spec.axes, segments, strict=True) if axis.side == "in")


def _writes_residual(spec: ParameterSpec) -> bool:
    """Whether it writes a layer's output into the residual stream: zero in a copied layer under `zero`."""
    return spec.stacked and spec.find(Unit.HIDDEN, "out") is not None
