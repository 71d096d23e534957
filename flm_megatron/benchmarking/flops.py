"""FLOPs that the hardware does in a training step: the model's, and what recomputation does again."""

from __future__ import annotations

from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.model.parameters import FC1, FC2, HEAD, parameter_specs
from flm_megatron.training.metrics.flops import CONVENTION, forward_flops_per_token, training_flops_per_token

__all__ = ["NOTE", "hardware_flops_per_token", "training_flops_per_token"]

NOTE = (
    f"TFLOP/s and MFU: {CONVENTION}, over the dense peak of the data sheet (n/a where the device is not in the table). "
    "HFU adds the products that recomputation does again."
)


def hardware_flops_per_token(stage: StageConfig, sequence_length: int) -> float:
    """Model FLOPs of a token's forward and backward pass, and those of recomputation: with `full` the forward pass of
    all layers once more, with `selective` that of the feed-forward matrices."""
    again = {"none": 0.0, "selective": _feed_forward(stage.model), "full": _layers(stage.model, sequence_length)}
    return training_flops_per_token(stage.model, sequence_length) + again[stage.recompute]


def _layers(model: ModelConfig, sequence_length: int) -> float:
    return forward_flops_per_token(model, sequence_length) - 2.0 * parameter_specs(model)[HEAD].numel


def _feed_forward(model: ModelConfig) -> float:
    specs = parameter_specs(model)
    return 2.0 * sum(specs[f"{name}.weight"].numel for name in (FC1, FC2))
