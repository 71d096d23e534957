"""Mistral: Llama's block without biases, and perhaps a sliding window in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from flm_megatron.checkpoint.hugging_face.families.family import Family, Values
from flm_megatron.checkpoint.hugging_face.families.llama import MODULES, decoder_settings
from flm_megatron.checkpoint.hugging_face.schema import DecoderFields, Heads, read_fields
from flm_megatron.config.schema import ModelConfig
from flm_megatron.json_text import JsonObject


class MistralFields(DecoderFields):
    """The fields that determine a Mistral's function, with the defaults of transformers' MistralConfig."""

    num_key_value_heads: Heads | None = 8
    sliding_window: Annotated[int, Field(ge=1)] | None = 4096


def _model(config: JsonObject, where: str) -> ModelConfig:
    fields = read_fields(config, MistralFields, where)
    return ModelConfig(**fields.shape(), sliding_window=fields.sliding_window)


def _settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    return decoder_settings(model, sequence_length) | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": model.sliding_window,
    }


EXPRESSES: Mapping[str, Values] = {"rope_scaling": None, "sliding_window": None, "tie_embeddings": None}
MISTRAL = Family("mistral", MODULES, _model, _settings, EXPRESSES)
