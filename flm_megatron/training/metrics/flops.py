"""Model FLOPs of a training step. No torch here: the planner uses it too."""

from __future__ import annotations

from flm_megatron.config.schema import ModelConfig
from flm_megatron.model.parameters import parameter_specs

CONVENTION = "model FLOPs, causal attention counted half, no recomputation"


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward pass, by Megatron-LM's convention.

    Two per weight of every matrix and of the head, and the two attention products over the keys that causality and a
    sliding window leave.
    """
    weights = sum(spec.numel for spec in parameter_specs(model).values() if spec.multiplies)
    keys = seen_keys(model, sequence_length)
    attention = 2 * 2 * keys * model.num_attention_heads * model.kv_channels * model.num_layers
    return 2.0 * weights + attention


def seen_keys(model: ModelConfig, sequence_length: int) -> float:
    """Keys that a query sees in the mean: half of the sequence, or of a sliding window w the w last, but for the first
    w queries, which see half of that."""
    window = min(model.sliding_window or sequence_length, sequence_length)
    return window * (1 - window / (2 * sequence_length))


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward: the backward pass costs twice the forward pass."""
    return 3.0 * forward_flops_per_token(model, sequence_length)
