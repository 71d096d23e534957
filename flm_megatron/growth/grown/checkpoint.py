"""A grown checkpoint that is never stored: each region is computed from the source when it is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import torch

from flm_megatron import __version__
from flm_megatron.checkpoint.files.manifest import sealed
from flm_megatron.checkpoint.lazy.generator import truncated_normal
from flm_megatron.checkpoint.logical import (
    EXP_AVG,
    EXP_AVG_SQ,
    MASTER,
    STATE_PREFIXES,
    LogicalCheckpoint,
    Region,
    TensorInfo,
    split_name,
)
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.operators import Constant, FilledRegion, Fresh, Mean, Old, Operators
from flm_megatron.growth.grown.step_offsets import carries_moments
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.record import GrowthRecord, R, change_behind
from flm_megatron.model.parameters import EMBEDDING, parameter_specs


class GrownCheckpoint(LogicalCheckpoint):
    """`source` grown by `plan`: weights, and masters and moments where the source has them.

    Old values are scaled where the plan scales weights, first moments as the gradients and second moments as their
    squares (1/c and 1/c^2 for weights times c); new entries have zero moments, and so do copies unless the plan keeps
    theirs. New values depend on the plan's seed and stage, the tensor's name and the global index only.

    Raises:
        RequestError: the source's tensors are not those of the plan's old model.
    """

    def __init__(self, source: LogicalCheckpoint, plan: GrowthPlan, manifest: Manifest | None = None) -> None:
        self.source, self.plan = source, plan
        self.operators = Operators(plan)
        check_source(source, plan.old)
        self.tensors = {name: info for name in self.operators.specs for name, info in self._infos(name)}
        self.record = change_record(source, GrowthRecord(plan), carries_moments(source, plan))
        self.manifest = (manifest or Manifest()) | self.record.in_manifest()

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of `name`; reads only the old regions that fill it."""
        if name not in self.tensors:
            raise RequestError(f"the grown checkpoint has no tensor {name!r}")
        info = self.tensors[name]
        region = region or Region.whole(info.shape)
        prefix, parameter = split_name(name)
        out: torch.Tensor | None = None
        for filled in self.operators.regions(parameter, region):
            weights = prefix in ("", MASTER)
            values = (self._weights if weights else self._moments)(prefix, parameter, filled)
            if isinstance(values, torch.Tensor) and values.shape == region.sizes and values.dtype == info.dtype:
                return values  # one source fills all of it: no copy
            out = torch.empty(region.sizes, dtype=info.dtype) if out is None else out
            out[filled.region.within(region).slices] = values
        return torch.empty(region.sizes, dtype=info.dtype) if out is None else out

    def _infos(self, name: str) -> list[tuple[str, TensorInfo]]:
        """The parameter, and its optimizer state if the source has it (of the embedding, if it has no layers)."""
        shape = self.operators.specs[name].shape
        like = name if name in self.source.tensors else EMBEDDING
        prefixes = ("", *STATE_PREFIXES)
        return [(p + name, TensorInfo(shape, i.dtype)) for p in prefixes if (i := self.source.tensors.get(p + like))]

    def _weights(self, prefix: str, name: str, filled: FilledRegion) -> torch.Tensor | float:
        """Weights or masters of one region. A low-precision weight that changes is rounded from its fp32 master."""
        content = filled.content
        if isinstance(content, Constant):
            return content.value
        if isinstance(content, Fresh):
            return self._draw(name, filled.region, content.std, self.tensors[prefix + name].dtype)
        noise = content.noise if isinstance(content, Old) else None
        if isinstance(content, Old) and content.scale == 1.0 and noise is None:
            return self.source.read(prefix + name, content.region)
        values = read_exact(self.source, prefix + name, content.region)
        if isinstance(content, Mean):
            values = axis_mean(values, content.axis)
        values = values * content.scale
        return values if noise is None else values + self._draw(name, noise.region, noise.std, values.dtype)

    def _draw(self, name: str, region: Region, std: float, dtype: torch.dtype) -> torch.Tensor:
        """Truncated normal values that belong to a region of the grown tensor."""
        key, shape = f"growth:{self.plan.stage}:{name}", self.operators.specs[name].shape
        return truncated_normal(self.plan.seed, key, shape, region, std, dtype=dtype)

    def _moments(self, prefix: str, name: str, filled: FilledRegion) -> torch.Tensor | float:
        """Moments of one region: scaled as the gradient is, where they are not kept zero or grown."""
        content = filled.content
        if not isinstance(content, Old) or not self.plan.keeps_moments(content.copy):
            return filled.exp_avg_sq if prefix == EXP_AVG_SQ else 0.0
        return scaled_moments(self.source.read(prefix + name, content.region), prefix, content.gradient_ratio)


def read_exact(source: LogicalCheckpoint, name: str, region: Region) -> torch.Tensor:
    """A weight or master to be scaled: from its fp32 master if it has one, in fp32 (float64 stays float64)."""
    master = MASTER + split_name(name)[1]
    values = source.read(master if master in source.tensors else name, region)
    return values if values.dtype == torch.float64 else values.float()


def scaled_moments(values: torch.Tensor, prefix: str, ratio: float) -> torch.Tensor:
    """First or second moments, as `prefix` says, of weights whose gradient was `ratio` times what it is now."""
    return values if ratio == 1.0 else values / ratio ** (1 if prefix == EXP_AVG else 2)


def axis_mean(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Mean over `axis` (kept with size 1), summed pairwise in float64: the same bits however the region is cut."""
    size, total = values.shape[axis], values.double()
    while (n := total.shape[axis]) > 1:
        half = n // 2
        paired = total.narrow(axis, 0, half) + total.narrow(axis, half, half)
        total = torch.cat([paired, total.narrow(axis, n - 1, 1)], axis) if n % 2 else paired
    return (total / size).to(values.dtype)


def change_record(source: LogicalCheckpoint, record: R, moments: bool) -> R:
    """`record`, of a plan alone, with the source's hash and path, whether its moments go on, the program's version."""
    text = json.dumps(sealed(source.manifest), sort_keys=True)
    at = source.manifest.position
    return replace(
        record,
        source_logical_hash=source.manifest.logical_hash or None,
        source_manifest_sha256=hashlib.sha256(text.encode()).hexdigest(),
        source_stage=at.stage,
        source_step=at.step,
        optimizer_step=(at.optimizer_step or 0) if moments else 0,
        moments=moments,
        code_version=__version__,
        before=change_behind(source.manifest),
    )


def check_source(source: LogicalCheckpoint, model: ModelConfig) -> None:
    """Check that a checkpoint has the tensors of `model`. Raises RequestError, naming the first that differs."""
    for name, spec in parameter_specs(model).items():
        found = source.tensors.get(name)
        if found is None or tuple(found.shape) != spec.shape:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise RequestError(
                f"the source checkpoint does not fit the stage before: {name} {what}, the run file makes it "
                f"{spec.shape}"
            )
