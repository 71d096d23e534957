"""GPT-NeoX and Pythia: LayerNorm, GELU and biases everywhere, rotary positions on a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from flm_megatron.checkpoint.hugging_face.families.family import Family, Modules, Values
from flm_megatron.checkpoint.hugging_face.rotary import Positive, RotaryFields, rotary_settings
from flm_megatron.checkpoint.hugging_face.schema import DecoderFields, read_fields
from flm_megatron.config.rules.model import rotary_channels_are_pairs
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

LAYER = "gpt_neox.layers.{layer}."
FUSED = f"{LAYER}attention.query_key_value"
MODULES: Modules = {
    EMBEDDING.removesuffix(".weight"): {"": "gpt_neox.embed_in"},
    ATTENTION_NORM: {"": f"{LAYER}input_layernorm"},
    QKV: {"query": FUSED, "key": FUSED, "value": FUSED},  # one after the other in every head, as here
    PROJECTION: {"": f"{LAYER}attention.dense"},
    MLP_NORM: {"": f"{LAYER}post_attention_layernorm"},
    FC1: {"": f"{LAYER}mlp.dense_h_to_4h"},
    FC2: {"": f"{LAYER}mlp.dense_4h_to_h"},
    FINAL_NORM: {"": "gpt_neox.final_layer_norm"},
    HEAD.removesuffix(".weight"): {"": "embed_out"},
}
Share = Annotated[float, Field(gt=0, le=1)]


class PartialRotaryFields(RotaryFields):
    """The rotary positions of all layers, of a part of each head."""

    partial_rotary_factor: Share | None = None


class GPTNeoXFields(DecoderFields):
    """The fields that determine a GPT-NeoX's function, with the defaults of transformers' GPTNeoXConfig."""

    num_key_value_heads: None = None
    head_dim: None = None
    hidden_act: Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"] = "gelu"  # type: ignore[assignment]
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1, alias="layer_norm_eps")] = 1e-5
    rope_theta: Annotated[Positive | None, Field(alias="rotary_emb_base")] = None
    rope_scaling: PartialRotaryFields | None = None
    rope_parameters: PartialRotaryFields | None = None
    rotary_pct: Share | None = None
    use_parallel_residual: bool = True
    attention_bias: Literal[True] = True

    @property
    def rotary_percent(self) -> float:
        """Share of a head that turns, from where transformers 5 or version 4 stores it."""
        found = [place.partial_rotary_factor for place in (self.rope_parameters, self.rope_scaling) if place]
        return next((share for share in (*found, self.rotary_pct) if share is not None), 0.25)


def _model(config: JsonObject, where: str) -> ModelConfig:
    fields = read_fields(config, GPTNeoXFields, where)
    model = ModelConfig(
        **fields.shape(),
        normalization="layernorm",
        activation="gelu" if fields.hidden_act == "gelu" else "gelu_tanh",
        bias=True,
        parallel_residual=fields.use_parallel_residual,
        rotary_percent=fields.rotary_percent,
    )
    if line := rotary_channels_are_pairs(model):
        raise RequestError(f"{where}: config.json has rotary_pct {fields.rotary_percent}: {line}")
    return model


def _settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": "gelu" if model.activation == "gelu" else "gelu_pytorch_tanh",
        "layer_norm_eps": model.norm_epsilon,
        **rotary_settings(model),
        "rotary_emb_base": model.rope_theta,
        "rotary_pct": model.rotary_percent,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": sequence_length,
        "initializer_range": model.matrix_init_std,
    }


EXPRESSES: Mapping[str, Values] = {
    "normalization": ("layernorm",),
    "activation": ("gelu", "gelu_tanh"),
    "bias": (True,),
    "parallel_residual": (False, True),
    **dict.fromkeys(("rotary_percent", "rope_scaling", "tie_embeddings")),
}
BUFFERS = ("attention.bias", "attention.masked_bias")
GPT_NEOX = Family("gpt_neox", MODULES, _model, _settings, EXPRESSES, plain_heads=True, buffers=BUFFERS)
