"""The fields of a Hugging Face `config.json` that determine the function: types, limits, and what is refused.

A field that changes the function and that this program does not implement is refused by name, never ignored. Fields
that no family computes with (tokens, caches, versions, dropout) are left alone.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from flm_megatron.checkpoint.hugging_face.rotary import Positive, RotaryFields
from flm_megatron.config.schema import RopeScaling
from flm_megatron.errors import RequestError
from flm_megatron.json_text import JsonObject
from flm_megatron.model.limits import (
    LARGEST_FFN,
    LARGEST_HEAD,
    LARGEST_HIDDEN,
    LARGEST_VOCABULARY,
    MOST_HEADS,
    MOST_LAYERS,
)

STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
Vocabulary = Annotated[int, Field(ge=1, le=LARGEST_VOCABULARY)]
Heads = Annotated[int, Field(ge=1, le=MOST_HEADS)]

UNSUPPORTED = (
    "quantization_config",
    "compression_config",
    "sparsity_config",
    "pruned_heads",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "no_rope_layers",
    "attention_chunk_size",
    "attention_multiplier",
    "use_bidirectional_attention",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "clip_qkv",
    "qk_norm",
    "use_qk_norm",
    "qk_layernorm",
    "query_key_norm",
    "parallel_attn",
    "use_parallel_residual",
    "alibi",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "is_encoder_decoder",
    "add_cross_attention",
)
"""Fields of other architectures and of compressed weights: any value but null, false, 0 or empty is refused."""
LIKE_LLAMA = {"partial_rotary_factor": 1.0, "rotary_pct": 1.0, "position_embedding_type": "rope", "is_causal": True}
"""Fields of other architectures, with the value at which they describe Llama."""


class Shape(TypedDict):
    """Fields of a model by their names in ModelConfig."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None
    head_dim: int | None
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool


Fields = TypeVar("Fields", bound="DecoderFields")


class DecoderFields(BaseModel):
    """The fields that most families share, with the defaults of transformers' LlamaConfig.

    A family adds its own. One that is in `UNSUPPORTED` or `LIKE_LLAMA` is no longer refused there, once it is a field.
    """

    model_config = STRICT
    channels_multiple: ClassVar[int] = 2
    """Of a head's channels: rotary positions turn pairs."""
    num_hidden_layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)]
    hidden_size: Annotated[int, Field(ge=1, le=LARGEST_HIDDEN)]
    intermediate_size: Annotated[int, Field(ge=1, le=LARGEST_FFN)]
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=2, le=LARGEST_HEAD, multiple_of=2)] | None = None
    vocab_size: Vocabulary
    true_vocab_size: Vocabulary | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    rope_theta: Positive | None = None
    rope_scaling: RotaryFields | None = None
    rope_parameters: RotaryFields | None = None
    tie_word_embeddings: bool | None = None

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies, from where transformers 5 or version 4 stores it."""
        found = [place.rope_theta for place in (self.rope_parameters, self.rope_scaling) if place]
        return next((theta for theta in (*found, self.rope_theta) if theta is not None), 10000.0)

    def scaling(self) -> RopeScaling | None:
        """Scaling of the rotary frequencies. Raises ValueError, saying what is wrong, if it is no such thing."""
        found = []
        for name in ("rope_parameters", "rope_scaling"):
            fields: RotaryFields | None = getattr(self, name)
            try:
                found += [fields.scaling()] if fields is not None else []
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if len(found) == 2 and found[0] != found[1]:
            raise ValueError("rope_parameters and rope_scaling that disagree: take one of them out")
        if found and found[0] is not None and found[0].kind == "yarn" and self.theta <= 1:
            raise ValueError(f"rope_theta {self.theta}, with which type 'yarn' cannot compute: it has to be above 1")
        return found[0] if found else None

    def shape(self) -> Shape:
        """What these fields say of a model; `vocab_size` is the true one if `true_vocab_size` tells it."""
        heads = self.num_attention_heads
        return {
            "num_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_attention_heads": heads,
            "num_query_groups": _unless_same(self.num_key_value_heads, heads),
            "head_dim": _unless_same(self.head_dim, self.hidden_size // heads),
            "vocab_size": self.true_vocab_size or self.vocab_size,
            "norm_epsilon": self.rms_norm_eps,
            "rope_theta": self.theta,
            "rope_scaling": self.scaling(),
            "tie_embeddings": bool(self.tie_word_embeddings),
        }


def read_fields(config: JsonObject, kind: type[Fields], where: str) -> Fields:
    """The fields `kind` of a `config.json`, each of its type and within its limits.

    Raises RequestError, naming `where`, the field and its value.
    """
    _refuse_unsupported(config, kind, where)
    try:
        fields = kind.model_validate(config)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        name = ".".join(map(str, mistake["loc"]))
        if mistake["type"] == "missing":
            raise RequestError(f"{where}: config.json has no {name}, so it does not describe a decoder") from None
        raise RequestError(
            f"{where}: config.json has {name} {_shown(mistake['input'])}: {_expected(mistake)}"
        ) from None
    _check_heads(fields, where)
    _check_rotary(fields, where)
    return fields


def _expected(mistake: ErrorDetails) -> str:
    if mistake["type"] == "extra_forbidden":
        return f"no field of {mistake['loc'][0]} that is supported here"
    if mistake["type"] == "literal_error":
        return f"only {mistake['ctx']['expected']} is supported here"
    return str(mistake["msg"]).replace("Input should be", "it should be")


def _check_heads(fields: DecoderFields, where: str) -> None:
    heads, groups = fields.num_attention_heads, fields.num_key_value_heads
    if groups is not None and heads % groups:
        raise RequestError(
            f"{where}: config.json has num_key_value_heads {groups}, by which num_attention_heads {heads} cannot be "
            "divided"
        )
    if fields.head_dim is None and fields.hidden_size % (fields.channels_multiple * heads):
        known = type(fields).model_fields
        hidden, count = (known[name].alias or name for name in ("hidden_size", "num_attention_heads"))
        raise RequestError(
            f"{where}: config.json has {count} {heads} and no head_dim: {hidden} {fields.hidden_size} does not give "
            f"each head {'an even' if fields.channels_multiple == 2 else 'a whole'} number of channels"
        )


def _check_rotary(fields: DecoderFields, where: str) -> None:
    try:
        fields.scaling()
    except ValueError as error:
        raise RequestError(f"{where}: config.json has {error}") from None


def _refuse_unsupported(config: JsonObject, kind: type[DecoderFields], where: str) -> None:
    for name in UNSUPPORTED:
        if (value := config.get(name)) and name not in kind.model_fields:
            raise RequestError(f"{where}: config.json has {name} {_shown(value)}, which is not supported here")
    for name, wanted in LIKE_LLAMA.items():
        if config.get(name, wanted) not in (wanted, None) and name not in kind.model_fields:
            raise RequestError(
                f"{where}: config.json has {name} {_shown(config[name])}; only {wanted!r} is supported here"
            )


def _unless_same(value: int | None, default: int) -> int | None:
    return None if value is None or value == default else value


def _shown(value: object) -> str:
    """A value in at most 80 characters."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "of over 40 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
