"""Tele-FLM's released form: Llama's names, and fields for the multipliers of its muP parametrization."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flm_megatron.checkpoint.hugging_face.families.family import Family
from flm_megatron.checkpoint.hugging_face.families.llama import (
    EXPRESSES,
    MODULES,
    LlamaFields,
    llama_model,
    llama_settings,
)
from flm_megatron.checkpoint.hugging_face.schema import Positive, read_fields
from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import JsonObject

Multiplier = Annotated[float, Field(ge=-1e30, le=1e30)]
Deviation = Annotated[float, Field(ge=0, le=1e6)]


class TeleflmFields(LlamaFields):
    """Llama's fields, the multipliers, and the deviations of initial weights. Without `use_mup` multipliers are 1."""

    use_mup: bool | None = None
    mup_scale_factor: Positive = 1.0
    input_mult: Multiplier = 1.0
    output_mult: Multiplier = 1.0
    matrix_init_std: Deviation | None = None
    vector_init_std: Deviation | None = None


def is_teleflm(config: JsonObject, model_type: str) -> bool:
    """Whether a `config.json` is Tele-FLM's, whose `model_type` may be another where it has the multipliers."""
    named = model_type.startswith("teleflm")
    return named or "mup_scale_factor" in config or (model_type == "llama" and "use_mup" in config)


def _model(config: JsonObject, where: str) -> ModelConfig:
    fields = read_fields(config, TeleflmFields, where)
    model = llama_model(fields, where)
    if not fields.use_mup:
        return model
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


def _settings(model: ModelConfig, sequence_length: int) -> dict[str, object]:
    return llama_settings(model, sequence_length) | {
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


TELEFLM = Family(
    "teleflm",
    MODULES,
    _model,
    _settings,
    EXPRESSES,
    multipliers=True,
    code=("configuration_teleflm.py", "modeling_teleflm.py"),
)
