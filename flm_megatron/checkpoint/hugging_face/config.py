"""Reads a folder's `config.json`, and writes one."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.hugging_face.families.family import Family
from flm_megatron.checkpoint.hugging_face.families.registry import family_of
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import DamagedError, RequestError, read_error
from flm_megatron.json_text import JsonObject, parse_json

LARGEST_JSON = 64 * 2**20


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

    Raises RequestError for a family that is not known, or a field that is wrong or not supported, naming it.
    """
    return family_of(config, where).model(config, where)


def config_of(
    model: ModelConfig, family: Family, padded_vocab: int, sequence_length: int, dtype: str
) -> dict[str, object]:
    """The `config.json` of `model`; `padded_vocab` is the rows of embedding and head, `dtype` torch's name."""
    return {
        **family.settings(model, sequence_length),
        "vocab_size": padded_vocab,
        "true_vocab_size": model.vocab_size,
        "use_cache": True,
        "torch_dtype": dtype,
    }
