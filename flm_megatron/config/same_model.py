"""Whether two models compute the same from the same weights, and a run file's model made of a checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace

from flm_megatron.config.schema import LoraConfig, ModelConfig, RopeScaling

CLOSE = 1e-7
"""Relative difference of two constants below which fp32 does not tell them apart."""
FUNCTION = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
    *("vocab_size", "normalization", "activation", "bias", "qkv_bias", "position", "norm_epsilon", "rope_theta"),
    *("query_key_norm", "query_key_norm_epsilon", "parallel_residual", "rotary_percent", "max_positions"),
    *("rope_scaling", "xpos_scale_base", "sliding_window", "tie_embeddings", "input_mult", "output_mult", "lora"),
)
"""Fields that the function of a model with given weights follows from."""
LABELS = {"output_mult": "the factor on the logits (model.output_mult over muP's width factor)"}


def differences(
    ours: ModelConfig, theirs: ModelConfig, places: tuple[str, str] = ("the run file", "the checkpoint")
) -> list[str]:
    """Where `ours` is another function of its weights than `theirs`: a line each, which says in which of `places` a
    value stands.

    Effective values are compared: a head_dim that is left out is hidden_size / num_attention_heads, muP counts by its
    factor on the logits alone (its learning rates are the run file's), a vocabulary that is not known is any. Initial
    deviations change nothing that is loaded. Adapters that are ours alone are new; theirs are part of the function.
    """
    here, there = places
    mine, other = _function(ours), _function(theirs)
    return [
        f"{LABELS.get(name, f'model.{name}')} is {mine[name]!r} in {here} and {other[name]!r} in {there}"
        for name in mine
        if not _same(name, mine[name], other[name])
    ]


def laid_over(given: ModelConfig, found: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """`found`, a checkpoint's model, with what a run file states otherwise; and where that changes its function.

    A field of `given` at its default states nothing.
    """
    default = ModelConfig()
    names = [field.name for field in fields(ModelConfig) if field.name != "from_checkpoint"]
    stated = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(default, name)}
    model = replace(found, **stated)
    return model, differences(model, found)


def _function(model: ModelConfig) -> Mapping[str, object]:
    """All that the function of a model with given weights follows from, by the fields of the run file."""
    effective = {
        "num_query_groups": model.query_groups,
        "head_dim": model.kv_channels,
        "rotary_percent": model.rotary_channels / model.kv_channels,
        "rope_theta": model.rope_theta if model.rotates else None,
        "xpos_scale_base": model.xpos_scale_base if model.position == "xpos" else None,
        "query_key_norm_epsilon": model.query_key_epsilon if model.query_key_norm else None,
        "output_mult": model.logit_multiplier,
        "rope_scaling": _scaling(model.rope_scaling),
        "lora": _adapters(model.lora),
    }
    return {name: effective.get(name, getattr(model, name)) for name in FUNCTION}


def _scaling(scaling: RopeScaling | None) -> dict[str, object] | None:
    return {"kind": scaling.kind, **scaling.constants} if scaling else None


def _adapters(lora: LoraConfig | None) -> dict[str, object] | None:
    return asdict(replace(lora, targets=sorted(lora.targets))) if lora else None


def _same(name: str, ours: object, theirs: object) -> bool:
    if name == "lora" and theirs is None:
        return True
    if name in ("vocab_size", "xpos_scale_base", "query_key_norm_epsilon") and None in (ours, theirs):
        return True
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=CLOSE)
    return bool(ours == theirs)
