"""GPT-2: learned positions, LayerNorm, GELU and biases everywhere, and matrices stored with their inputs first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flm_megatron.checkpoint.hugging_face.families.family import Family, Modules, Values
from flm_megatron.checkpoint.hugging_face.schema import DecoderFields, Heads, read_fields
from flm_megatron.config.ranges import LARGEST_SEQUENCE
from flm_megatron.config.schema import ModelConfig
from flm_megatron.json_text import JsonObject
from flm_megatron.model.limits import LARGEST_FFN, LARGEST_HIDDEN, MOST_LAYERS
from flm_megatron.model.parameters import (
    ATTENTION_NORM,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    HEAD,
    MLP_NORM,
    POSITIONS,
    PROJECTION,
    QKV,
)

BODY = "transformer."
LAYER = f"{BODY}h.{{layer}}."
FUSED = f"{LAYER}attn.c_attn"
MODULES: Modules = {
    EMBEDDING.removesuffix(".weight"): {"": f"{BODY}wte"},
    POSITIONS.removesuffix(".weight"): {"": f"{BODY}wpe"},
    ATTENTION_NORM: {"": f"{LAYER}ln_1"},
    QKV: {"query": FUSED, "key": FUSED, "value": FUSED},
    PROJECTION: {"": f"{LAYER}attn.c_proj"},
    MLP_NORM: {"": f"{LAYER}ln_2"},
    FC1: {"": f"{LAYER}mlp.c_fc"},
    FC2: {"": f"{LAYER}mlp.c_proj"},
    FINAL_NORM: {"": f"{BODY}ln_f"},
    HEAD.removesuffix(".weight"): {"": "lm_head"},
}


class GPT2Fields(DecoderFields):
    """The fields that determine a GPT-2's function, with the defaults of transformers' GPT2Config."""

    channels_multiple: ClassVar[int] = 1
    num_hidden_layers: Annotated[int, Field(ge=0, le=MOST_LAYERS, alias="n_layer")]
    hidden_size: Annotated[int, Field(ge=1, le=LARGEST_HIDDEN, alias="n_embd")]
    intermediate_size: Annotated[int | None, Field(ge=1, le=LARGEST_FFN, alias="n_inner")] = None  # type: ignore[assignment]
    num_attention_heads: Annotated[Heads, Field(alias="n_head")]
    num_key_value_heads: None = None
    head_dim: None = None
    n_positions: Annotated[int, Field(ge=1, le=LARGEST_SEQUENCE)] = 1024
    hidden_act: Annotated[
        Literal["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu"], Field(alias="activation_function")
    ] = "gelu_new"  # type: ignore[assignment]
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1, alias="layer_norm_epsilon")] = 1e-5
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    reorder_and_upcast_attn: Literal[False] = False
    tie_word_embeddings: bool | None = True


def _model(config: JsonObject, where: str) -> ModelConfig:
    fields = read_fields(config, GPT2Fields, where)
    shape = fields.shape()
    shape["ffn_hidden_size"] = fields.intermediate_size or 4 * fields.hidden_size
    return ModelConfig(
        **shape,
        normalization="layernorm",
        activation="gelu" if fields.hidden_act == "gelu" else "gelu_tanh",
        bias=True,
        position="learned",
        max_positions=fields.n_positions,
    )


def _settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_positions,
        "activation_function": "gelu" if model.activation == "gelu" else "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "scale_attn_weights": True,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.matrix_init_std,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


EXPRESSES: Mapping[str, Values] = {
    "normalization": ("layernorm",),
    "activation": ("gelu", "gelu_tanh"),
    "bias": (True,),
    "position": ("learned",),
    **dict.fromkeys(("max_positions", "tie_embeddings")),
}
BUFFERS = (".attn.bias", ".attn.masked_bias")
GPT2 = Family(
    *("gpt2", MODULES, _model, _settings, EXPRESSES),
    plain_heads=True,
    transposed=True,
    bands_by_kind=True,
    body=BODY,
    buffers=BUFFERS,
)
