"""A checkpoint of a stage as it would be on disk, without its values."""

from __future__ import annotations

import torch

from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.config.schema import StageConfig
from flm_megatron.model.parameters import parameter_specs


class StageCheckpoint(LogicalCheckpoint):
    """Weights in the stage's precision with fp32 masters and moments of those that learn."""

    def __init__(self, stage: StageConfig) -> None:
        dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
        specs = parameter_specs(stage.model)
        self.manifest = Manifest(position=StagePosition(step=1, optimizer_step=1, stage=stage.name))
        self.tensors = {name: TensorInfo(spec.shape, dtype) for name, spec in specs.items()} | {
            prefix + name: TensorInfo(spec.shape, torch.float32)
            for name, spec in specs.items()
            if spec.trained
            for prefix in (MASTER, EXP_AVG, EXP_AVG_SQ)
        }

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """A tensor without values, if torch's fake tensors are on."""
        info = self.tensors[name]
        return torch.empty((region or Region.whole(info.shape)).sizes, dtype=info.dtype)
