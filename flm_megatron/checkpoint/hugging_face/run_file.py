"""A run file for the model of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.hugging_face.config import model_from_config, read_json
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.data.tokenizer import tokenizer_in
from flm_megatron.json_text import JsonObject


def run_file_of_folder(folder: Path) -> JsonObject:
    """Plain data of a run file that starts from `folder`: its model with every field, its weights and its tokenizer.

    Everything else is left to its default. Only `config.json` is read.

    Raises:
        RequestError: no such folder, a family that is not known, or a field that is not supported.
        DamagedError: `config.json` is no JSON.
    """
    model = model_from_config(read_json(folder / "config.json"), str(folder))
    whole = run_to_dict(RunConfig(stages=[StageConfig(name="base", model=model)]))
    tokenizer = tokenizer_in(folder)
    return {
        **({"tokenizer": str(tokenizer)} if tokenizer else {}),
        "stages": [{"name": "base", "model": whole["stages"][0]["model"]}],
        "checkpoint": {"initial": str(folder)},
    }
