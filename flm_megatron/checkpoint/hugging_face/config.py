"""Hugging Face `config.json` to the model's configuration and back, for Llama and for Tele-FLM's released form."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flm_megatron.checkpoint.hugging_face.schema import ModelFields, read_fields
from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.errors import DamagedError, RequestError, read_error
from flm_megatron.json_text import JsonObject, parse_json

LARGEST_JSON = 64 * 2**20
Flavour = Literal["teleflm", "llama"]


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file. Raises RequestError if the file is missing, DamagedError if it is not JSON."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        raise RequestError(f"{path.parent} is not a Hugging Face checkpoint: it has no {path.name}") from None
    except OSError as error:
        raise read_error(path, error) from error
    if len(text) > LARGEST_JSON:
        raise DamagedError(f"{path}: more than {LARGEST_JSON:,} bytes, which is no file of a model's settings")
    value = parse_json(text, str(path), DamagedError, strict=True, name="a JSON file")
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: a JSON object was expected, not a {type(value).__name__}")
    return value


def model_from_config(config: JsonObject, where: str) -> ModelConfig:
    """The model that a `config.json` describes; `where` names it in errors.

    Without muP fields the multipliers are 1. `vocab_size` is the true one if `true_vocab_size` tells it.
    Raises RequestError for another architecture, or a field that is wrong or not supported, naming it.
    """
    _refuse_other_models(config, where)
    fields = read_fields(config, where)
    heads = fields.num_attention_heads
    model = ModelConfig(
        num_layers=fields.num_hidden_layers,
        hidden_size=fields.hidden_size,
        ffn_hidden_size=fields.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=_unless_same(fields.num_key_value_heads, heads),
        head_dim=_unless_same(fields.head_dim, fields.hidden_size // heads),
        vocab_size=fields.true_vocab_size or fields.vocab_size,
        bias=bool(fields.attention_bias),
        norm_epsilon=fields.rms_norm_eps,
        rope_theta=fields.theta,
    )
    return _with_multipliers(model, fields, where) if fields.use_mup else model


def llama_shape(model: ModelConfig) -> dict[str, int]:
    """The sizes of a model's layers by their names in a Llama's `config.json`."""
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.kv_channels,
    }


def config_of(
    model: ModelConfig, flavour: Flavour, padded_vocab: int, sequence_length: int, dtype: str
) -> dict[str, object]:
    """The `config.json` of `model`; `padded_vocab` is the rows of embedding and head, `dtype` torch's name."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **llama_shape(model),
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


def _released_fields(model: ModelConfig) -> dict[str, object]:
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


def _with_multipliers(model: ModelConfig, fields: ModelFields, where: str) -> ModelConfig:
    factor = fields.mup_scale_factor
    base = max(1, round(model.hidden_size / factor))
    if model.hidden_size / base != factor:
        raise RequestError(
            f"{where}: mup_scale_factor {factor} does not divide hidden_size {model.hidden_size} to a whole base width"
        )
    model.mup = MupConfig(enabled=True, base_hidden_size=base) if factor != 1 else MupConfig()
    model.input_mult, model.output_mult = fields.input_mult, fields.output_mult
    if fields.matrix_init_std is not None:
        model.matrix_init_std = fields.matrix_init_std
    if fields.vector_init_std is not None:
        model.vector_init_std = fields.vector_init_std
    return model


def _refuse_other_models(config: JsonObject, where: str) -> None:
    given = config.get("model_type", "")
    kind = given.lower().replace("-", "").replace("_", "") if isinstance(given, str) else ""
    if kind != "llama" and not kind.startswith("teleflm") and "mup_scale_factor" not in config:
        raise RequestError(f"{where}: model_type {given!r:.80} is not supported: llama and teleflm are")


def _unless_same(value: int | None, default: int) -> int | None:
    return None if value is None or value == default else int(value)
