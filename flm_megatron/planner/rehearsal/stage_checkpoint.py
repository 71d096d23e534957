"""A checkpoint of a stage as it would be on disk, without its values: what a rank reads of it is counted."""

from __future__ import annotations

import threading

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.config.schema import StageConfig
from flm_megatron.model.parameters import parameter_specs


class StageCheckpoint(LogicalCheckpoint):
    """Weights in the stage's precision with fp32 masters and moments, of which `regions` and `nbytes` were read."""

    def __init__(self, stage: StageConfig, fake: FakeTensorMode) -> None:
        dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
        specs = parameter_specs(stage.model)
        self.manifest = Manifest(position=StagePosition(step=1, optimizer_step=1))
        self.tensors = {name: TensorInfo(spec.shape, dtype) for name, spec in specs.items()} | {
            prefix + name: TensorInfo(spec.shape, torch.float32)
            for name, spec in specs.items()
            if spec.trained
            for prefix in (MASTER, EXP_AVG, EXP_AVG_SQ)
        }
        self.regions = self.nbytes = 0
        self._fake, self._lock = fake, threading.Lock()

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """A tensor without values; several threads may read at once."""
        info = self.tensors[name]
        region = region or Region.whole(info.shape)
        with self._lock, self._fake:
            values = torch.empty(region.sizes, dtype=info.dtype)
            self.regions += 1
            self.nbytes += values.nbytes
        return values
