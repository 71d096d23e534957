"""Importance, and models cut out of a larger one, that the tests of shrinking share."""

from __future__ import annotations

from typing import Any

import torch

from flm_megatron.config.schema import ModelConfig, ShrinkConfig
from flm_megatron.growth.shrink.choice import make_shrink_plan
from flm_megatron.growth.shrink.importance import Importance, tensor_shapes
from flm_megatron.growth.shrink.plan import ShrinkPlan

CRITERIA = {"hidden": "activation", "ffn": "activation", "heads": "activation", "layers": "influence"}
SMALLER: dict[str, dict[str, Any]] = {
    "hidden": {"hidden_size": 13},
    "ffn": {"ffn_hidden_size": 21},
    "groups": {"num_attention_heads": 2, "num_query_groups": 1},
    "heads_per_group": {"num_attention_heads": 2},
    "layers": {"num_layers": 2},
    "all": {
        "hidden_size": 13,
        "ffn_hidden_size": 21,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "num_layers": 2,
    },
}
"""What can be cut out of `growth_cases.old_model`."""


def drawn_importance(model: ModelConfig, seed: int = 3, **changes: Any) -> Importance:
    """Random importance of `model`, or the tensors of `changes`."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {n: torch.rand(s, generator=draw, dtype=torch.float64) for n, s in tensor_shapes(model).items()}
    values: dict[str, Any] = {"criteria": CRITERIA, "samples": 2, "tokens": 32, "source_hash": "ab", **tensors}
    return Importance(model, **{**values, **changes})


def shrink_plan(old: ModelConfig, case: str = "all", **changes: Any) -> ShrinkPlan:
    """Plan of one of SMALLER out of `old`, by random importance."""
    values = {**{k: v for k, v in vars(old).items() if not k.startswith("_")}, **SMALLER[case]}
    return make_shrink_plan(old, ModelConfig(**values), ShrinkConfig(**changes), drawn_importance(old), "small")
