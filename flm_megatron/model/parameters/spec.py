"""One row of the table: one logical parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flm_megatron.model.parameters.axis import Axis, Cut, Side, Unit

Kind = Literal["embedding", "head", "matrix", "norm", "bias"]
Value = Literal["weight", "bias", "lora_a", "lora_b"]
Place = Literal["first", "layers", "last"]


@dataclass(frozen=True)
class ParameterSpec:
    """One logical parameter.

    `axes` say what its global shape counts and how tensor parallelism cuts it; if the first counts layers, the
    parameters of all layers are stacked on it. `value` is the last word of its name, such as `weight`. `init_std` is
    the standard deviation of the truncated normal it starts from; at 0 it starts at the constant `init_mean`.
    `lr_scale` multiplies the learning rate of its kind (muP: 1/m for matrices). A parameter that is not `trained`,
    beside adapters, has no optimizer state. `module_name` is its name in a module tree, without the layer's number, if
    that differs: checkpoints name the norms of a layer after the linear layer that reads them, as Transformer Engine's
    fused modules do. A `tied` embedding is the head too: the last model chunk has it, or a copy under `module_name`.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Kind
    init_std: float
    init_mean: float = 0.0
    lr_scale: float = 1.0
    value: Value = "weight"
    module_name: str | None = None
    trained: bool = True
    tied: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape, the vocabulary without padding."""
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether the parameters of all layers are stacked on the first axis."""
        return self.axes[0].unit is Unit.LAYER

    @property
    def place(self) -> Place:
        """Where in the pipeline it is: in the first model chunk, in those of its layers, or in the last one. (A tied
        embedding is in the last one too.)"""
        if self.stacked:
            return "layers"
        return "first" if self.kind == "embedding" else "last"

    @property
    def places(self) -> tuple[Place, ...]:
        """Its place, and where a copy of it is."""
        return (self.place, "last") if self.tied else (self.place,)

    @property
    def multiplies(self) -> bool:
        """Whether activations are multiplied by it: matrices and the head, not an embedding that is looked up alone."""
        return self.kind in ("matrix", "head") or self.tied

    @property
    def module(self) -> str:
        """Name of the logical module whose `value` it is."""
        return self.name[: -len(self.value) - 1]

    @property
    def padded(self) -> bool:
        """Whether tensor parallelism pads it."""
        return any(axis.cut is Cut.PADDED for axis in self.axes)

    def find(self, unit: Unit, side: Side | None) -> int | None:
        """Index of the axis that counts `unit` on this side; none if it has no such axis."""
        return next((i for i, axis in enumerate(self.axes) if (axis.unit, axis.side) == (unit, side)), None)

    def counts(self, unit: Unit) -> bool:
        """Whether any of its axes counts `unit`."""
        return any(axis.unit is unit for axis in self.axes)

    @property
    def cut(self) -> bool:
        """Whether tensor parallelism cuts it; else every tensor rank has all of it."""
        return any(axis.cut is not Cut.WHOLE for axis in self.axes)

    def shard_numel(self, tensor: int) -> int:
        """Values on one of `tensor` ranks, padding included."""
        return math.prod(axis.padded_size(tensor) for axis in self.axes) // (tensor if self.cut else 1)
