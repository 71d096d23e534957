"""Models, sources and growths that the growth tests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.config.schema import GrowthConfig, ModelConfig, MupConfig
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.model.parameters import parameter_specs


class MemoryCheckpoint(LogicalCheckpoint):
    """Tensors held in memory."""

    def __init__(self, values: Mapping[str, torch.Tensor], manifest: Manifest | None = None) -> None:
        self.values = dict(values)
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in values.items()}
        self.manifest = manifest or Manifest()

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """A copy of a region."""
        value = self.values[name]
        return value[region.slices].clone() if region else value.clone()


def trained(model: ModelConfig, dtype: torch.dtype = torch.float64, optimizer: bool = False) -> MemoryCheckpoint:
    """A stand-in for trained weights: every tensor, norms and biases too, has random values."""
    draw = torch.Generator().manual_seed(7)
    values = {}
    for name, spec in parameter_specs(model).items():
        noise = torch.randn(spec.shape, generator=draw, dtype=torch.float64)
        values[name] = (spec.init_mean + 0.2 * noise).to(dtype)
        if optimizer:
            values[MASTER + name] = (spec.init_mean + 0.2 * noise).float()
            values[EXP_AVG + name] = torch.randn(spec.shape, generator=draw)
            values[EXP_AVG_SQ + name] = torch.rand(spec.shape, generator=draw)
    return MemoryCheckpoint(values, Manifest(position=StagePosition(40, optimizer_step=40, stage="small")))


def old_model(**changes: Any) -> ModelConfig:
    """3 layers, 2 query groups of 2 heads, a vocabulary that no padding fits, an epsilon that matters."""
    values: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 50,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 6,
        "vocab_size": 37,
        "norm_epsilon": 1e-2,
        "input_mult": 1.5,
        "output_mult": 2.0,
        "matrix_init_std": 0.2,
        "mup": MupConfig(enabled=True, base_hidden_size=16),
    }
    return ModelConfig(**{**values, **changes})


GROWN: dict[str, dict[str, Any]] = {
    "hidden": {"hidden_size": 33},
    "ffn": {"ffn_hidden_size": 87},
    "groups": {"num_attention_heads": 6, "num_query_groups": 3},
    "heads_per_group": {"num_attention_heads": 6},
    "heads_and_groups": {"num_attention_heads": 15, "num_query_groups": 5},
    "layers": {"num_layers": 5},
    "deep": {"num_layers": 8},
    "all": {
        "hidden_size": 33,
        "ffn_hidden_size": 110,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "num_layers": 5,
    },
}


CLONED = {**GROWN, "hidden": {"hidden_size": 72}, "all": {**GROWN["all"], "hidden_size": 48}}
"""Growths that clones fit: the hidden size by a whole factor, the rest with remainders."""


def growth(operator: str, **changes: Any) -> GrowthConfig:
    """The same operator for every dimension (with `clone`, `zero` for layers); layers are copied by interleaving."""
    layers = "zero" if operator == "clone" else operator
    values = {"hidden": operator, "ffn": operator, "heads": operator, "layers": layers}
    return GrowthConfig(**{**values, "layer_selection": "interleave", "mask_steps": 4, **changes})


def plan_for(case: str, operator: str, old: ModelConfig, growth_changes: dict[str, Any] | None = None) -> GrowthPlan:
    """Plan of one of GROWN from `old`."""
    values = {**{k: v for k, v in vars(old).items() if not k.startswith("_")}, **GROWN[case]}
    return make_plan(old, ModelConfig(**values), growth(operator, **(growth_changes or {})), seed=5, stage="big")


def weights(checkpoint: LogicalCheckpoint, model: ModelConfig) -> dict[str, torch.Tensor]:
    """All weights of a model."""
    return {name: checkpoint.read(name) for name in parameter_specs(model)}


def grown_weights(plan: GrowthPlan, source: LogicalCheckpoint) -> dict[str, torch.Tensor]:
    """All weights after growth."""
    return weights(GrownCheckpoint(source, plan), plan.new)
