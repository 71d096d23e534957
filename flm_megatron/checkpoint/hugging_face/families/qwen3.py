"""Qwen 3: Llama's block with norms of queries and keys, and perhaps a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from flm_megatron.checkpoint.hugging_face.families.family import Family, Modules, Values
from flm_megatron.checkpoint.hugging_face.families.llama import LAYER, MODULES
from flm_megatron.checkpoint.hugging_face.families.qwen2 import QwenFields, qwen_settings
from flm_megatron.checkpoint.hugging_face.schema import read_fields
from flm_megatron.config.schema import ModelConfig
from flm_megatron.json_text import JsonObject
from flm_megatron.model.limits import LARGEST_HEAD
from flm_megatron.model.parameters import KEY_NORM, QUERY_NORM

QWEN3_MODULES: Modules = {
    **MODULES,
    QUERY_NORM: {"": f"{LAYER}self_attn.q_norm"},
    KEY_NORM: {"": f"{LAYER}self_attn.k_norm"},
}


class Qwen3Fields(QwenFields):
    """The fields that determine a Qwen 3's function, with the defaults of transformers' Qwen3Config."""

    head_dim: Annotated[int, Field(ge=2, le=LARGEST_HEAD, multiple_of=2)] | None = 128
    attention_bias: Literal[False] | None = None


def _model(config: JsonObject, where: str) -> ModelConfig:
    fields = read_fields(config, Qwen3Fields, where)
    return ModelConfig(**fields.shape(), query_key_norm=True, sliding_window=fields.window(where))


def _settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    return qwen_settings(model, sequence_length) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
    }


EXPRESSES: Mapping[str, Values] = {
    "query_key_norm": (True,),
    "query_key_norm_epsilon": None,  # folded into the weights
    "rope_scaling": None,
    "sliding_window": None,
    "tie_embeddings": None,
}
QWEN3 = Family("qwen3", QWEN3_MODULES, _model, _settings, EXPRESSES)
