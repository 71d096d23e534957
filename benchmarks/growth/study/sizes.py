"""The models of the study, and the values that were tuned for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.json_text import JsonObject
from flm_megatron.model.parameters import parameter_count
from flm_megatron.training.metrics.flops import training_flops_per_token

SEQUENCE, BATCH = 128, 16
STEP_TOKENS = SEQUENCE * BATCH
HEAD_DIM = 16
TUNED = Path(__file__).with_name("tuned.json")
"""Values by size, from `flm mup search` (see ../tuning.md)."""
OPTIMIZER = "lr", "weight_decay"


@dataclass(frozen=True)
class Shape:
    """By how much a model is below the large one: hidden size, feed-forward size and heads, layers."""

    hidden: int = 1
    units: int = 1
    layers: int = 1


SHAPES = {
    "large": Shape(),
    "thin": Shape(hidden=2, units=2),
    "slim": Shape(units=2),
    "shallow": Shape(layers=2),
    "one": Shape(layers=4),
    "small": Shape(hidden=2, units=2, layers=2),
}


@dataclass(frozen=True)
class Sizes:
    """All models below one large model of `layers` layers and width `hidden`, over a vocabulary of `vocab`.

    `lr` takes the place of the tuned learning rates.
    """

    hidden: int
    layers: int
    vocab: int
    lr: float | None = None

    def model(self, name: str) -> ModelConfig:
        """The model of that name, with its tuned values."""
        shape, values = SHAPES[name], {k: v for k, v in self.tuned(name).items() if k not in OPTIMIZER}
        return ModelConfig(
            num_layers=self.layers // shape.layers,
            hidden_size=self.hidden // shape.hidden,
            ffn_hidden_size=self.hidden * 11 // 4 // shape.units,
            num_attention_heads=self.hidden // HEAD_DIM // shape.units,
            head_dim=HEAD_DIM,
            vocab_size=self.vocab,
            mup=MupConfig(enabled=True, base_hidden_size=self.hidden // 2),
            **values,
        )

    def tuned(self, name: str) -> JsonObject:
        """Learning rate, weight decay, initial deviations and multipliers of a model."""
        values: dict[str, JsonObject] = json.loads(TUNED.read_text())
        own = {**values["every"], **values.get(name, {})}
        return own if self.lr is None else own | {"lr": self.lr}

    def flops(self, name: str) -> float:
        """Training FLOPs per token."""
        return training_flops_per_token(self.model(name), SEQUENCE)

    @property
    def parameters(self) -> int:
        """Parameters of the large model."""
        return parameter_count(self.model("large"))

    def steps(self, per_parameter: float, share: float = 1.0) -> int:
        """Steps of the large model that make up a share of a budget in tokens per parameter, in whole UNITs."""
        return round(share * per_parameter * self.parameters / STEP_TOKENS / UNIT) * UNIT


UNIT = 20
"""Steps between checkpoints: whatever branches off does so at a multiple."""
