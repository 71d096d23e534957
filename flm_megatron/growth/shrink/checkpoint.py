"""A smaller model's checkpoint that is never stored: each region is gathered from the larger one's when it is read."""

from __future__ import annotations

from functools import partial

import torch

from flm_megatron.checkpoint.logical import MASTER, STATE_PREFIXES, LogicalCheckpoint, Region, TensorInfo, split_name
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import change_record, check_source, read_exact, scaled_moments
from flm_megatron.growth.grown.step_offsets import has_moments
from flm_megatron.growth.record import ShrinkRecord
from flm_megatron.growth.shrink.gather import Gather, Gathered, gather
from flm_megatron.growth.shrink.plan import ShrinkPlan
from flm_megatron.model.parameters import ATTENTION_NORM, MLP_NORM, ParameterSpec, Unit

PLACES = {ATTENTION_NORM: 0, MLP_NORM: 1}
"""The norms of a layer in the order of the residual stream."""


class ShrunkCheckpoint(LogicalCheckpoint):
    """What `plan` keeps of `source`: weights, and masters and moments where the source has them.

    Values are scaled where the plan scales weights, moments as the gradients are (1/c and 1/c^2 for weights times c).

    Raises:
        RequestError: the source's tensors are not those of the plan's old model.
    """

    def __init__(self, source: LogicalCheckpoint, plan: ShrinkPlan, manifest: Manifest | None = None) -> None:
        self.source, self.plan = source, plan
        self._gather = Gather(plan)
        check_source(source, plan.old)
        self.tensors = {
            prefix + name: TensorInfo(spec.shape, source.tensors[prefix + name].dtype)
            for name, spec in self._gather.specs.items()
            for prefix in ("", *STATE_PREFIXES)
            if prefix + name in source.tensors
        }
        self.record = change_record(source, ShrinkRecord(plan), has_moments(source))
        self.manifest = (manifest or Manifest()) | self.record.in_manifest()

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of `name`; reads the old regions around what is kept of them."""
        if name not in self.tensors:
            raise RequestError(f"the shrunk checkpoint has no tensor {name!r}")
        info = self.tensors[name]
        region = region or Region.whole(info.shape)
        prefix, parameter = split_name(name)
        values = self._weights if prefix in ("", MASTER) else self._moments
        return gather(
            self._gather, parameter, region, info.dtype, partial(values, prefix, self._gather.specs[parameter])
        )

    def _weights(self, prefix: str, spec: ParameterSpec, part: Gathered) -> torch.Tensor:
        """Weights or masters. A low-precision weight that changes is rounded from its fp32 master."""
        scale = self._scale(spec, part.layer)
        if scale == 1.0:
            return part.pick(self.source.read(prefix + spec.name, part.source))
        return part.pick(read_exact(self.source, prefix + spec.name, part.source)) * scale

    def _moments(self, prefix: str, spec: ParameterSpec, part: Gathered) -> torch.Tensor:
        values = part.pick(self.source.read(prefix + spec.name, part.source))
        return scaled_moments(values, prefix, self._scale(spec, part.layer))

    def _scale(self, spec: ParameterSpec, layer: int | None) -> float:
        """Factor on the old values of a parameter in a layer of the smaller model."""
        scale = self.plan.multiplier_scale(spec)
        if spec.kind != "norm" or not spec.counts(Unit.HIDDEN):
            return scale
        norm = 2 * self.plan.new.num_layers if layer is None else 2 * layer + PLACES[spec.module]
        return scale * self.plan.norm_scale(norm)
