"""Hugging Face `config.json` to the model's configuration and back, for Llama and for Tele-FLM's released form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.errors import DamagedError, RequestError

Flavour = Literal["teleflm", "llama"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises RequestError if the file is missing, DamagedError if it is not JSON."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"{path.parent} is not a Hugging Face checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: a JSON object was expected, not a {type(value).__name__}")
    return value


def model_from_config(config: dict[str, Any], where: str) -> ModelConfig:
    """The model that a `config.json` describes; `where` names it in errors.

    Without muP fields the multipliers are 1. `vocab_size` is the true one if `true_vocab_size` tells it.
    Raises RequestError for another architecture, naming the field.
    """
    _refuse_unlike_llama(config, where)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        model = ModelConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=_unless_same(config.get("num_key_value_heads"), heads),
            head_dim=_unless_same(config.get("head_dim"), hidden // heads),
            vocab_size=config.get("true_vocab_size") or config["vocab_size"],
            bias=bool(config.get("attention_bias", False)),
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            rope_theta=_rope(config).get("rope_theta", 10000.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(repr(error).split())
        raise RequestError(f"{where}: config.json does not describe a decoder: {reason:.200}") from error
    return _with_multipliers(model, config, where) if config.get("use_mup") else model


def config_of(
    model: ModelConfig, flavour: Flavour, padded_vocab: int, sequence_length: int, dtype: str
) -> dict[str, Any]:
    """The `config.json` of `model`; `padded_vocab` is the rows of embedding and head, `dtype` torch's name."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": padded_vocab,
        "true_vocab_size": model.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": False,
        "max_position_embeddings": sequence_length,
        "initializer_range": model.matrix_init_std,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    return config | (_released_fields(model) if flavour == "teleflm" else {})


def _released_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["TeleFLMForCausalLM"],
        "model_type": "teleflm",
        "auto_map": {
            "AutoConfig": "configuration_teleflm.TeleFLMConfig",
            "AutoModelForCausalLM": "modeling_teleflm.TeleFLMForCausalLM",
        },
        "use_mup": True,
        "mup_scale_factor": model.width_factor,
        "input_mult": model.input_mult,
        "output_mult": model.output_mult,
        "matrix_init_std": model.matrix_init_std,
        "vector_init_std": model.vector_init_std,
    }


def _with_multipliers(model: ModelConfig, config: dict[str, Any], where: str) -> ModelConfig:
    factor = float(config.get("mup_scale_factor", 1.0))
    base = max(1, round(model.hidden_size / factor)) if factor > 0 else 1
    if model.hidden_size / base != factor:
        raise RequestError(
            f"{where}: mup_scale_factor {factor} does not divide hidden_size {model.hidden_size} to a whole base width"
        )
    model.mup = MupConfig(enabled=True, base_hidden_size=base) if factor != 1 else MupConfig()
    model.input_mult = float(config.get("input_mult", 1.0))
    model.output_mult = float(config.get("output_mult", 1.0))
    model.matrix_init_std = float(config.get("matrix_init_std", model.matrix_init_std))
    model.vector_init_std = float(config.get("vector_init_std", model.vector_init_std))
    return model


def _refuse_unlike_llama(config: dict[str, Any], where: str) -> None:
    kind = str(config.get("model_type", "")).lower().replace("-", "").replace("_", "")
    if kind != "llama" and not kind.startswith("teleflm") and "mup_scale_factor" not in config:
        raise RequestError(f"{where}: model_type {config.get('model_type')!r} is not supported: llama and teleflm are")
    rope = _rope(config)
    kinds = {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    wanted = (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("rope_type", kinds["rope_type"] or "default", "default"),
        ("mlp_bias", bool(config.get("mlp_bias", False)), bool(config.get("attention_bias", False))),
    )
    for name, value, expected in wanted:
        if value != expected:
            raise RequestError(f"{where}: config.json has {name} {value!r}; only {expected!r} is supported here")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, from where transformers 5 keeps them or from where version 4 did."""
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return theta | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})


def _unless_same(value: int | None, default: int) -> int | None:
    return None if value is None or value == default else int(value)
