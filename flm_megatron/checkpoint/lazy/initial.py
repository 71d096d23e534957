"""Fresh weights of a model as a checkpoint: nothing is stored, each region is computed when it is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flm_megatron.checkpoint.lazy.generator import truncated_normal
from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import ParameterSpec, parameter_specs

# The authors publish that the initial weights are truncated normal, not where they are cut off.
BOUND_IN_SIGMAS = 3.0


class InitialCheckpoint(LogicalCheckpoint):
    """The weights that `model` starts from under `seed`, in `dtype`.

    With `optimizer`, also fp32 masters, which are the weights before rounding to `dtype`, and moments of zero.
    """

    def __init__(
        self, model: ModelConfig, seed: int, optimizer: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        self.specs = parameter_specs(model)
        self.seed = seed
        self.manifest = Manifest(position=StagePosition(optimizer_step=0 if optimizer else None))
        infos = {name: TensorInfo(spec.shape, dtype) for name, spec in self.specs.items()}
        if optimizer:
            for prefix in (MASTER, EXP_AVG, EXP_AVG_SQ):
                infos |= {prefix + n: TensorInfo(s.shape, torch.float32) for n, s in self.specs.items()}
        self.tensors: Mapping[str, TensorInfo] = infos

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of a region, computed now."""
        if name not in self.tensors:
            raise RequestError(f"{name} is not a tensor of this model")
        info = self.tensors[name]
        region = region or Region.whole(info.shape)
        if name.startswith((EXP_AVG, EXP_AVG_SQ)):
            return torch.zeros(region.sizes, dtype=info.dtype)
        return _weights(self.specs[name.removeprefix(MASTER)], self.seed, region, info.dtype)


def _weights(spec: ParameterSpec, seed: int, region: Region, dtype: torch.dtype) -> torch.Tensor:
    if spec.init_std == 0:
        return torch.full(region.sizes, spec.init_mean, dtype=dtype)
    return truncated_normal(seed, spec.name, spec.shape, region, spec.init_std, spec.init_mean, BOUND_IN_SIGMAS, dtype)
