"""Smaller models out of which a model can grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flm_megatron.config.schema import GrowthConfig, ModelConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.rules import check_growth
from flm_megatron.model.parameters import parameter_count

DEPTHS, WIDTHS = (2, 3, 4), (2, 4)
"""By what the layers, or all widths, are divided."""


@dataclass(frozen=True)
class Candidate:
    """A small model and by what each dimension (of hidden, ffn, heads, layers) grows out of it."""

    name: str
    model: ModelConfig
    factors: Mapping[str, float]


def candidates(large: ModelConfig, stages: Sequence[StageConfig]) -> list[Candidate]:
    """The models of `stages`, then `large` with fewer layers, less width, or both; those that can grow into it."""
    given = [(f"stage {stage.name!r}", stage.model) for stage in stages]
    found: dict[tuple[object, ...], Candidate] = {}
    for name, model in (*given, *_divided(large)):
        factors = growth_factors(model, large)
        if factors and parameter_count(model) < parameter_count(large) and can_grow(model, large):
            found.setdefault(_sizes(model), Candidate(name, model, factors))
    return list(found.values())


def growth_factors(small: ModelConfig, large: ModelConfig) -> dict[str, float]:
    """By what each dimension that differs is larger in `large`; growth out of no layers is by an infinite factor."""
    names = "layers", "hidden", "ffn", "heads", "heads"
    sizes = zip(names, _sizes(small), _sizes(large), strict=True)
    return {name: after / before if before else math.inf for name, before, after in sizes if before != after}


def _sizes(model: ModelConfig) -> tuple[int, ...]:
    heads = model.num_attention_heads, model.query_groups
    return model.num_layers, model.hidden_size, model.ffn_hidden_size, *heads


def _divided(large: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    for by in DEPTHS:
        layers = large.num_layers // by
        if layers:
            yield f"{layers} of {large.num_layers} layers", replace(large, num_layers=layers)
    for by in WIDTHS:
        narrow, layers = _narrow(large, by), large.num_layers // by
        if narrow is not None:
            width = f"hidden size {narrow.hidden_size} of {large.hidden_size}"
            yield width, narrow
            if layers:
                yield f"{layers} of {large.num_layers} layers, {width}", replace(narrow, num_layers=layers)


def _narrow(large: ModelConfig, by: int) -> ModelConfig | None:
    """Hidden size, feed-forward size and heads divided, with the same head dim; none where they do not divide."""
    if any(size % by for size in _sizes(large)[1:]):
        return None
    return replace(
        large,
        hidden_size=large.hidden_size // by,
        ffn_hidden_size=large.ffn_hidden_size // by,
        num_attention_heads=large.num_attention_heads // by,
        num_query_groups=large.query_groups // by,
        head_dim=large.kv_channels,
    )


def can_grow(small: ModelConfig, large: ModelConfig, growth: GrowthConfig | None = None) -> bool:
    """Whether `small` grows into `large` by the given operators, or by those of the defaults."""
    try:
        check_growth(small, large, growth or GrowthConfig())
    except RequestError:
        return False
    return True
