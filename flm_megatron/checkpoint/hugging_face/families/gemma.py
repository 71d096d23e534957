"""Gemma (the first): Llama's block with GeGLU, norm weights stored less 1, the embedding times sqrt(hidden size)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from flm_megatron.checkpoint.hugging_face.families.family import Family, Values
from flm_megatron.checkpoint.hugging_face.families.llama import MODULES, decoder_settings
from flm_megatron.checkpoint.hugging_face.schema import DecoderFields, Heads, read_fields
from flm_megatron.config.schema import ModelConfig
from flm_megatron.json_text import JsonObject
from flm_megatron.model.limits import LARGEST_HEAD


class GemmaFields(DecoderFields):
    """The fields that determine a Gemma's function, with the defaults of transformers' GemmaConfig.

    `gelu` was written for the tanh form, which transformers takes it for; `hidden_activation` is of its version 4.
    """

    num_key_value_heads: Heads | None = 16
    head_dim: Annotated[int, Field(ge=2, le=LARGEST_HEAD, multiple_of=2)] | None = 256
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"] = "gelu_pytorch_tanh"  # type: ignore[assignment]
    hidden_activation: Literal["gelu_pytorch_tanh"] | None = None
    attention_bias: Literal[False] | None = None
    tie_word_embeddings: bool | None = True


def embedding_multiplier(model: ModelConfig) -> float:
    """What a Gemma multiplies the embedding's output by."""
    return math.sqrt(model.hidden_size)


def _model(config: JsonObject, where: str) -> ModelConfig:
    model = ModelConfig(**read_fields(config, GemmaFields, where).shape(), activation="geglu")
    return replace(model, input_mult=embedding_multiplier(model))


def _settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    return decoder_settings(model, sequence_length) | {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


EXPRESSES: Mapping[str, Values] = {"activation": ("geglu",), "rope_scaling": None, "tie_embeddings": None}
GEMMA = Family(
    "gemma",
    MODULES,
    _model,
    _settings,
    EXPRESSES,
    embedding_multiplier=embedding_multiplier,
    norm_offset=1.0,
)
