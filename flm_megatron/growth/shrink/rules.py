"""Which models can be cut out of which: a small rule per function, each raising RequestError with values and fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.rules import WIDTHS, check_kept_kind, queries_per_group

if TYPE_CHECKING:
    from flm_megatron.growth.shrink.importance import Criterion, Dimension

CRITERIA: dict[Dimension, tuple[Criterion, ...]] = {
    "hidden": ("activation", "gradient"),
    "ffn": ("activation", "gradient"),
    "heads": ("activation", "gradient"),
    "layers": ("influence", "gradient"),
}
"""Criteria of each dimension, the default first."""


def smaller_dimensions(old: ModelConfig, new: ModelConfig) -> list[Dimension]:
    """The dimensions of which units are dropped."""
    heads = (old.num_attention_heads, old.query_groups) != (new.num_attention_heads, new.query_groups)
    smaller: dict[Dimension, bool] = {
        "hidden": new.hidden_size < old.hidden_size,
        "ffn": new.ffn_hidden_size < old.ffn_hidden_size,
        "heads": heads,
        "layers": new.num_layers < old.num_layers,
    }
    return [name for name, does in smaller.items() if does]


def check_shrinking(old: ModelConfig, new: ModelConfig) -> None:
    """Check all rules on the model before and the smaller one.

    Raises:
        RequestError: `new` cannot be cut out of `old`.
    """
    check_kept_kind(old, new, "shrinking")
    check_nothing_grows(old, new)
    check_head_dim(old, new)
    check_queries_per_group(old, new)


def check_nothing_grows(old: ModelConfig, new: ModelConfig) -> None:
    """No dimension may grow."""
    for name in WIDTHS:
        before, after = getattr(old, name), getattr(new, name)
        if after > before:
            raise RequestError(
                f"{name} grows from {before} to {after}: shrinking only removes; give at most {before} (a shape that "
                "grows and shrinks takes two stages, one for each)"
            )


def check_head_dim(old: ModelConfig, new: ModelConfig) -> None:
    """Heads are removed whole."""
    if new.kv_channels != old.kv_channels:
        raise RequestError(
            f"head dim changes from {old.kv_channels} to {new.kv_channels}: shrinking removes whole heads; "
            f"set model.head_dim to {old.kv_channels}"
        )


def check_queries_per_group(old: ModelConfig, new: ModelConfig) -> None:
    """A kept group has heads of its own alone."""
    before, after = queries_per_group(old, new)
    if after > before:
        raise RequestError(
            f"query heads per group grow from {before} to {after} ({new.num_attention_heads} heads, "
            f"{new.query_groups} groups): groups keep heads of their own alone; give at most "
            f"{before * new.query_groups} heads or more groups"
        )
