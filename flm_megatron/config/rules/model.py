"""Rules on the shape of a model: each says in one line what does not fit, or gives None; one that
looks at several fields gives a line for each."""

from __future__ import annotations

from flm_megatron.config.ranges import LARGEST_MODEL, LARGEST_SEQUENCE, out_of_range
from flm_megatron.config.schema import ModelConfig, RopeScaling

LARGEST_RANK = 2**16
LARGEST_FACTOR = 10**6
POSITIVE = (
    "norm_epsilon",
    "rope_theta",
    "xpos_scale_base",
    "input_mult",
    "output_mult",
    "matrix_init_std",
    "vector_init_std",
)


def model_sizes_are_counts(model: ModelConfig) -> list[str]:
    """Counts are at least 1 (layers 0), and not beyond reason."""
    values = {f"model.{name}": (getattr(model, name), largest) for name, largest in LARGEST_MODEL.items()}
    values["model.mup.base_hidden_size"] = (model.mup.base_hidden_size, LARGEST_MODEL["hidden_size"])
    if model.lora is not None:
        values["model.lora.rank"] = (model.lora.rank, LARGEST_RANK)
    least = {"model.num_layers": 0}
    return out_of_range({name: (value, least.get(name, 1), largest) for name, (value, largest) in values.items()})


def constants_are_positive(model: ModelConfig) -> list[str]:
    """Standard deviations, multipliers and bases are above 0."""
    values = {name: getattr(model, name) for name in POSITIVE}
    values |= {"head_init_std": model.head_std}
    if model.query_key_norm_epsilon is not None:
        values["query_key_norm_epsilon"] = model.query_key_norm_epsilon
    return [f"model.{name} is {value}, give a number above 0" for name, value in values.items() if value <= 0]


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
    if model.rotates and model.kv_channels % 2:
        return (
            f"model.head_dim is {model.kv_channels} (hidden_size {model.hidden_size}, num_attention_heads "
            f"{model.num_attention_heads}), rotary positions need an even number of channels in a head"
        )
    return None


def rotary_channels_are_pairs(model: ModelConfig) -> str | None:
    """The share of a head that turns is of pairs of channels, and of plain rotary positions."""
    share, turned = model.rotary_percent, model.rotary_channels
    if share == 1:
        return None
    if model.position != "rope":
        return f"model.rotary_percent is {share}, but model.position is {model.position}: leave it out, or set rope"
    if not 0 < share < 1 or turned < 2 or turned % 2:
        return (
            f"model.rotary_percent is {share}, give a share up to 1 that is an even number of a head's "
            f"{model.kv_channels} channels"
        )
    if model.rope_scaling is not None and model.rope_scaling.kind == "yarn":  # it stretches what turns, not all scores
        return f"model.rotary_percent is {share}, but model.rope_scaling is yarn: all channels have to turn with it"
    return None


def learned_positions_are_counted(model: ModelConfig) -> str | None:
    """Learned positions are a table, whose length has to be known; others have none."""
    if model.rotates and model.max_positions is not None:
        return (
            f"model.max_positions is {model.max_positions}, but model.position is {model.position}: leave it out, or "
            "set position to learned"
        )
    if not model.rotates and model.max_positions is None:
        return "model.position is learned, but max_positions is not given: give the longest sequence in tokens"
    return None


def biases_are_said_once(model: ModelConfig) -> str | None:
    """The biases of all linear layers include those of queries, keys and values."""
    if model.bias and model.qkv_bias:
        return "model.bias and model.qkv_bias are both true: bias has them in every linear layer, leave one of them out"
    return None


def rope_scaling_fits(model: ModelConfig) -> list[str]:
    """Rotary positions alone are scaled, by a factor and bounds that make sense."""
    if model.rope_scaling is None:
        return []
    if model.position != "rope":
        return [f"model.rope_scaling is given, but model.position is {model.position}: leave it out, or set rope"]
    lines = [f"model.rope_scaling.{line}" for line in scaling_mistakes(model.rope_scaling)]
    if model.rope_scaling.kind == "yarn" and model.rope_theta <= 1:
        lines.append(f"model.rope_scaling is yarn, and model.rope_theta {model.rope_theta}: give a base above 1")
    return lines


def scaling_mistakes(scaling: RopeScaling) -> list[str]:
    """A line for each constant of a scaling that its kind cannot compute with."""
    lines = out_of_range({"original_length": (scaling.original_length, 1, LARGEST_SEQUENCE)})
    if not 1 <= scaling.factor <= LARGEST_FACTOR:
        lines.append(f"factor is {scaling.factor}, give a number from 1 to {LARGEST_FACTOR}")
    if scaling.attention_factor is not None and not 0 < scaling.attention_factor <= LARGEST_FACTOR:
        lines.append(f"attention_factor is {scaling.attention_factor}, give a number above 0, or leave it out")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        least, most = getattr(scaling, low), getattr(scaling, high)
        if not 0 < least < most <= LARGEST_FACTOR:
            lines.append(f"{low} is {least} and {high} {most}: give two numbers above 0, the first below the second")
    return lines


def query_key_epsilon_has_norms(model: ModelConfig) -> str | None:
    """An epsilon is of norms that are there."""
    if model.query_key_norm_epsilon is not None and not model.query_key_norm:
        return (
            f"model.query_key_norm_epsilon is {model.query_key_norm_epsilon}, but query_key_norm is false: leave one "
            "out, or set the other"
        )
    return None


def adapters_have_layers(model: ModelConfig) -> str | None:
    """Adapters are beside the matrices of layers."""
    if model.lora is not None and not model.num_layers:
        return "model.num_layers is 0, so model.lora has nothing to adapt: give at least 1 layer, or leave lora out"
    return None


def tied_head_starts_as_the_embedding(model: ModelConfig) -> str | None:
    """A head that is the embedding has no first values of its own."""
    if model.tie_embeddings and model.head_init_std is not None:
        return (
            f"model.head_init_std is {model.head_init_std}, but with tie_embeddings the head is the embedding, which "
            "starts with vector_init_std: leave head_init_std out"
        )
    return None


MODEL_RULES = (
    adapters_have_layers,
    biases_are_said_once,
    constants_are_positive,
    query_key_epsilon_has_norms,
    heads_divide_hidden,
    heads_divide_into_groups,
    head_dim_is_even,
    rotary_channels_are_pairs,
    learned_positions_are_counted,
    rope_scaling_fits,
    tied_head_starts_as_the_embedding,
)
