"""Adapters (LoRA): added to the checkpoint that a fine-tuning starts from, or merged into the weights they adapt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.config.schema import ModelConfig
from flm_megatron.model.parameters import parameter_specs


class WithNewAdapters(LogicalCheckpoint):
    """`source` with fresh adapters of `model`: B is zero, so the function is unchanged."""

    def __init__(self, source: LogicalCheckpoint, model: ModelConfig, seed: int) -> None:
        self.source, self._fresh = source, InitialCheckpoint(model, seed)
        self.manifest = source.manifest
        missing = {name: info for name, info in self._fresh.tensors.items() if name not in source.tensors}
        # What state the source has belongs to weights that do not learn here.
        weights = {name: info for name, info in source.tensors.items() if not name.startswith("optimizer.")}
        self.tensors: Mapping[str, TensorInfo] = {**weights, **missing}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region`; see `LogicalCheckpoint.read`."""
        return (self.source if name in self.source.tensors else self._fresh).read(name, region)


class MergedAdapters(LogicalCheckpoint):
    """Weights of `source` with its adapters merged, W + alpha / rank x B A, computed in fp32, region by region."""

    def __init__(self, source: LogicalCheckpoint, model: ModelConfig) -> None:
        assert model.lora is not None
        self.source, self._scale = source, model.lora.alpha / model.lora.rank
        self.model = replace(model, lora=None)
        self.manifest = source.manifest
        self._specs = parameter_specs(self.model)
        self.tensors: Mapping[str, TensorInfo] = {name: source.tensors[name] for name in self._specs}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region`; see `LogicalCheckpoint.read`."""
        region = region or Region.whole(self.tensors[name].shape)
        values = self.source.read(name, region)
        first, second = (f"{self._specs[name].module}.{factor}" for factor in ("lora_a", "lora_b"))
        if self._specs[name].value != "weight" or first not in self.source.tensors:
            return values
        (layer, row, column), (layers, rows, columns) = region.offsets, region.sizes
        rank = self.source.tensors[first].shape[1]
        a = self.source.read(first, Region((layer, 0, column), (layers, rank, columns))).float()
        b = self.source.read(second, Region((layer, row, 0), (layers, rows, rank))).float()
        return (values.float() + self._scale * b @ a).to(values.dtype)


def merged(checkpoint: LogicalCheckpoint, model: ModelConfig) -> tuple[LogicalCheckpoint, ModelConfig]:
    """The checkpoint and its model without adapters: merged if there are some, else unchanged."""
    if model.lora is None:
        return checkpoint, model
    checkpoint = MergedAdapters(checkpoint, model)
    return checkpoint, checkpoint.model
