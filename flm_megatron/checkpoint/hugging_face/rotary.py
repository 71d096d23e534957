"""Rotary positions in a `config.json`: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of 4."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from flm_megatron.config.rules.model import scaling_mistakes
from flm_megatron.config.schema import ModelConfig, RopeScaling

RotaryType = Literal["default", "linear", "llama3", "yarn"]
Positive = Annotated[float, Field(gt=0, le=1e30)]
OURS = {"original_max_position_embeddings": "original_length"}
"""Fields of ours that have other names there."""
CONSTANTS: dict[RotaryType, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor", "original_max_position_embeddings"), ("beta_slow", "beta_fast", "attention_factor")),
}
"""The constants that each type needs, and those that it may have."""


class RotaryFields(BaseModel):
    """The rotary positions of all layers; types and constants that are not understood are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    rope_type: RotaryType | None = None
    type: RotaryType | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    factor: float | None = None
    original_max_position_embeddings: Annotated[int, Field(le=10**12)] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_slow: float | None = None
    beta_fast: float | None = None
    attention_factor: float | None = None

    @property
    def kind(self) -> RotaryType:
        """The type, under its new or its old name."""
        return self.rope_type or self.type or "default"

    def scaling(self) -> RopeScaling | None:
        """The scaling that these fields describe. Raises ValueError, saying what is wrong, if they do not fit."""
        needed, others = CONSTANTS[self.kind]
        given = {name for name in RotaryFields.model_fields.keys() - NEUTRAL if getattr(self, name) is not None}
        if strange := sorted(given - {*needed, *others}):
            raise ValueError(f"{strange[0]} {getattr(self, strange[0])}: type {self.kind!r} does not have it")
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"no {missing[0]}, which type {self.kind!r} needs")
        if self.kind == "default":
            return None
        scaling = RopeScaling(self.kind, **{OURS.get(name, name): getattr(self, name) for name in given})
        if lines := scaling_mistakes(scaling):
            raise ValueError(lines[0])
        return scaling


NEUTRAL = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))


def rotary_settings(model: ModelConfig) -> dict[str, object]:
    """What a `config.json` says of the rotary positions of `model`, to either version."""
    scaling = model.rope_scaling
    if scaling is None:
        positions: dict[str, object] = {"rope_type": "default"}
    else:
        theirs = {ours: name for name, ours in OURS.items()}
        constants = {theirs.get(name, name): value for name, value in scaling.constants.items() if value is not None}
        positions = {"rope_type": scaling.kind, **constants}
    share = {} if model.rotary_percent == 1 else {"partial_rotary_factor": model.rotary_percent}
    parameters = positions | {"rope_theta": model.rope_theta} | share
    settings = {"rope_theta": model.rope_theta, "rope_parameters": parameters}
    return settings if scaling is None else settings | {"rope_scaling": positions}
