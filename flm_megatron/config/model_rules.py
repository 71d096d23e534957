"""Rules on the shape of a model: each says in one line what does not fit, or gives None."""

from __future__ import annotations

from flm_megatron.config.schema import ModelConfig

SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
)
POSITIVE = (
    "norm_epsilon",
    "rope_theta",
    "xpos_scale_base",
    "input_mult",
    "output_mult",
    "matrix_init_std",
    "vector_init_std",
)


def model_sizes_are_positive(model: ModelConfig) -> str | None:
    """Counts are at least 1."""
    for name in SIZES:
        value = getattr(model, name)
        if value is not None and value < 1:
            return f"model.{name} is {value}, give at least 1"
    return None


def constants_are_positive(model: ModelConfig) -> str | None:
    """Standard deviations, multipliers and bases are above 0."""
    for name in POSITIVE:
        if getattr(model, name) <= 0:
            return f"model.{name} is {getattr(model, name)}, give a number above 0"
    return None


def heads_divide_hidden(model: ModelConfig) -> str | None:
    """Without an explicit head_dim, the heads share out the hidden size."""
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        return (
            f"model.hidden_size {model.hidden_size} is not a multiple of num_attention_heads "
            f"{model.num_attention_heads}: change one of them, or give head_dim"
        )
    return None


def heads_divide_into_groups(model: ModelConfig) -> str | None:
    """Every query group has the same number of query heads."""
    if model.num_attention_heads % model.query_groups:
        return (
            f"model.num_attention_heads {model.num_attention_heads} is not a multiple of num_query_groups "
            f"{model.query_groups}: every query group needs the same number of heads"
        )
    return None


def head_dim_is_even(model: ModelConfig) -> str | None:
    """Rotary positions turn pairs of channels."""
    if model.kv_channels % 2:
        return (
            f"model.head_dim is {model.kv_channels} (hidden_size {model.hidden_size}, num_attention_heads "
            f"{model.num_attention_heads}), rotary positions need an even number of channels in a head"
        )
    return None


def mup_base_is_positive(model: ModelConfig) -> str | None:
    """The width factor is hidden_size / base_hidden_size."""
    if model.mup.base_hidden_size < 1:
        return f"model.mup.base_hidden_size is {model.mup.base_hidden_size}, give the width of the searched model"
    return None


MODEL_RULES = (
    constants_are_positive,
    heads_divide_hidden,
    heads_divide_into_groups,
    head_dim_is_even,
    mup_base_is_positive,
)
