"""Growth as arithmetic on regions: for any region of a grown tensor, the pieces it is made of.

`docs/growth.md` derives the rules. In short: old weights stay in the top-left block (times a scale where a norm or a
multiplier changes); new weights are drawn as for a fresh model of the new shape; under `zero`, new weights that would
write into what the old model computes are zero instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from flm_megatron.checkpoint.logical import Region
from flm_megatron.growth.grown.axes import ROLES, Role, Segment, axis_segments
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.model import parameters as p
from flm_megatron.model.parameters import ParameterSpec, parameter_specs

LAST_OF_SUBLAYER = tuple(f"{name}.{part}" for name in (p.PROJECTION, p.FC2) for part in ("weight", "bias"))
"""The tensors that write a layer's output into the residual stream: zero in a copied layer under `zero`."""


@dataclass(frozen=True)
class Old:
    """Values of the old tensor's `region`, times `scale`; `copy` where the layer is a copy of its source."""

    region: Region
    scale: float
    copy: bool


@dataclass(frozen=True)
class Mean:
    """The mean over `axis` of the old tensor's `region` times `scale`, the same for every new index along that axis."""

    region: Region
    axis: int
    scale: float


@dataclass(frozen=True)
class Constant:
    """One value."""

    value: float


@dataclass(frozen=True)
class Fresh:
    """Truncated normal values, a function of seed, tensor name and global index."""

    std: float


Content = Old | Mean | Constant | Fresh


@dataclass(frozen=True)
class Piece:
    """A rectangle of the grown tensor and what fills it."""

    region: Region
    content: Content


class Operators:
    """The pieces of every tensor of one growth."""

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self.specs = parameter_specs(plan.new)

    def pieces(self, name: str, region: Region) -> Iterator[Piece]:
        """Pieces of `region` of parameter `name`: they cover it once, in row-major order of their corners."""
        axes = [
            [c for s in axis_segments(self.plan, role) if (c := s.clip(start, start + size))]
            for role, start, size in zip(ROLES[name], region.offsets, region.sizes, strict=True)
        ]
        for segments in itertools.product(*axes):
            rectangle = Region(tuple(s.start for s in segments), tuple(s.size for s in segments))
            yield Piece(rectangle, self._content(self.specs[name], segments))

    def scale(self, name: str) -> float:
        """Factor on the old values of parameter `name`; its first moment takes 1 / scale, its second 1 / scale^2."""
        if name == p.EMBEDDING:
            return self.plan.embedding_scale
        if name == p.HEAD:
            return self.plan.head_scale
        is_norm_weight = self.specs[name].kind == "norm"
        return self.plan.norm_scale if is_norm_weight else 1.0

    def _content(self, spec: ParameterSpec, segments: tuple[Segment, ...]) -> Content:
        roles = ROLES[spec.name]
        copy = any(s.copy for s in segments)
        if copy and self.plan.layers == "zero" and spec.name in LAST_OF_SUBLAYER:
            return Constant(0.0)
        new_roles = {role for role, s in zip(roles, segments, strict=True) if s.source is None}
        if not new_roles:
            source = Region(tuple(s.source or 0 for s in segments), tuple(s.size for s in segments))
            return Old(source, self.scale(spec.name), copy)
        if self._is_zero(new_roles):
            return Constant(0.0)
        if "write" in new_roles and self.plan.hidden == "zero":
            return self._zero_hidden(spec, roles, segments)
        if spec.init_std == 0:
            return Constant(spec.init_mean * self.scale(spec.name))
        return Fresh(spec.init_std)

    def _is_zero(self, new_roles: set[Role]) -> bool:
        """Whether these are outgoing weights of new heads or new feed-forward units under `zero`."""
        return ("head" in new_roles and self.plan.heads == "zero") or ("down" in new_roles and self.plan.ffn == "zero")

    def _zero_hidden(self, spec: ParameterSpec, roles: tuple[Role, ...], segments: tuple[Segment, ...]) -> Content:
        """What writes into new hidden channels: zero; under LayerNorm the mean of the old channels.

        LayerNorm subtracts the mean over all channels: new channels that hold the old mean leave it as it is, and are
        zero once it is subtracted. RMSNorm subtracts nothing.
        """
        others_old = all(s.source is not None for role, s in zip(roles, segments, strict=True) if role != "write")
        if self.plan.old.normalization == "rmsnorm" or not others_old:
            return Constant(0.0)
        axis = roles.index("write")
        offsets, sizes = [s.source or 0 for s in segments], [s.size for s in segments]
        sizes[axis] = self.plan.old.hidden_size
        return Mean(Region(tuple(offsets), tuple(sizes)), axis, self.scale(spec.name))
