"""Limits on the sizes of a model in a foreign file: far above any trained model, low enough for the parameter table."""

from __future__ import annotations

from collections.abc import Iterator

from flm_megatron.config.rules.model import rotary_channels_are_pairs
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError

MOST_LAYERS = 10_000
LARGEST_HIDDEN = 2**20
LARGEST_FFN = 2**23
MOST_HEADS = 2**16
LARGEST_HEAD = 2**16
LARGEST_VOCABULARY = 2**27


def check_limits(model: ModelConfig, where: str) -> ModelConfig:
    """Return `model` if its sizes are within the limits; raise RequestError, naming `where` and the field, if not."""
    for name, value, largest in _sizes(model):
        least = 0 if name == "num_layers" else 1
        if not least <= value <= largest:
            raise RequestError(f"{where}: {name} is {_shown(value)}: it has to lie between {least} and {largest:,}")
    if model.num_attention_heads % model.query_groups:
        raise RequestError(
            f"{where}: {model.num_attention_heads} heads cannot be shared out to {model.query_groups} query groups"
        )
    if not 0 < model.norm_epsilon < 1 or not model.rope_theta > 0:
        raise RequestError(
            f"{where}: norm_epsilon is {model.norm_epsilon} and rope_theta {model.rope_theta}: the first has to lie "
            "between 0 and 1, the second above 0"
        )
    if line := rotary_channels_are_pairs(model):
        raise RequestError(f"{where}: {line.removeprefix('model.')}")
    return model


def _sizes(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Name, value and largest value of each size; those that divide by others come after these."""
    yield "num_layers", model.num_layers, MOST_LAYERS
    yield "hidden_size", model.hidden_size, LARGEST_HIDDEN
    yield "ffn_hidden_size", model.ffn_hidden_size, LARGEST_FFN
    yield "num_attention_heads", model.num_attention_heads, MOST_HEADS
    yield "num_query_groups", model.query_groups, model.num_attention_heads
    yield "head_dim", model.kv_channels, LARGEST_HEAD
    yield "mup.base_hidden_size", model.mup.base_hidden_size, LARGEST_HIDDEN
    yield "vocab_size", 1 if model.vocab_size is None else model.vocab_size, LARGEST_VOCABULARY


def _shown(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**30 else "a number of over 30 digits"
