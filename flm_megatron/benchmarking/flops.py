"""FLOPs that the hardware executes in a training step: the model's, and recomputation."""

from __future__ import annotations

from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.model.parameters import Unit, parameter_specs
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
    head = model.hidden_size * (model.vocab_size or 0)
    return forward_flops_per_token(model, sequence_length) - 2.0 * head


def _feed_forward(model: ModelConfig) -> float:
    matrices = (spec for spec in parameter_specs(model).values() if spec.kind == "matrix" and spec.value == "weight")
    return 2.0 * sum(spec.numel for spec in matrices if spec.counts(Unit.FFN))
