"""Llama."""

from __future__ import annotations

from collections.abc import Mapping

from flm_megatron.checkpoint.hugging_face.families.family import Family, Modules, Values
from flm_megatron.checkpoint.hugging_face.rotary import rotary_settings
from flm_megatron.checkpoint.hugging_face.schema import DecoderFields, read_fields
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import JsonObject
from flm_megatron.model.parameters import (
    ATTENTION_NORM,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    HEAD,
    MLP_NORM,
    PROJECTION,
    QKV,
)

LAYER = "model.layers.{layer}."
MODULES: Modules = {
    EMBEDDING.removesuffix(".weight"): {"": "model.embed_tokens"},
    ATTENTION_NORM: {"": f"{LAYER}input_layernorm"},
    QKV: {
        "query": f"{LAYER}self_attn.q_proj",
        "key": f"{LAYER}self_attn.k_proj",
        "value": f"{LAYER}self_attn.v_proj",
    },
    PROJECTION: {"": f"{LAYER}self_attn.o_proj"},
    MLP_NORM: {"": f"{LAYER}post_attention_layernorm"},
    FC1: {"gate": f"{LAYER}mlp.gate_proj", "up": f"{LAYER}mlp.up_proj"},
    FC2: {"": f"{LAYER}mlp.down_proj"},
    FINAL_NORM: {"": "model.norm"},
    HEAD.removesuffix(".weight"): {"": "lm_head"},
}


class LlamaFields(DecoderFields):
    """The fields that determine a Llama's function, with the defaults of transformers' LlamaConfig."""

    attention_bias: bool | None = None
    mlp_bias: bool | None = None


def llama_model(fields: LlamaFields, where: str) -> ModelConfig:
    """The model that a Llama's fields describe. Raises RequestError for biases in some of the linear layers alone."""
    if bool(fields.attention_bias) != bool(fields.mlp_bias):
        raise RequestError(
            f"{where}: config.json has attention_bias {bool(fields.attention_bias)} and mlp_bias "
            f"{bool(fields.mlp_bias)}: biases in all linear layers or in none are supported here"
        )
    return ModelConfig(**fields.shape(), bias=bool(fields.attention_bias))


def _model(config: JsonObject, where: str) -> ModelConfig:
    return llama_model(read_fields(config, LlamaFields, where), where)


def llama_shape(model: ModelConfig) -> dict[str, int]:
    """The sizes of a model's layers by their names in a Llama's `config.json`."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.kv_channels,
    }


def decoder_settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    """What the `config.json` of Llama and of its relatives say of `model`, without the name of the family."""
    return {
        **llama_shape(model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        **rotary_settings(model),
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": sequence_length,
        "initializer_range": model.matrix_init_std,
    }


def llama_settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    """What a Llama's `config.json` says of `model`."""
    return decoder_settings(model, sequence_length) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
    }


EXPRESSES: Mapping[str, Values] = {"bias": (False, True), "rope_scaling": None, "tie_embeddings": None}
LLAMA = Family("llama", MODULES, _model, llama_settings, EXPRESSES)
