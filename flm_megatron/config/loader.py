"""Reading a run file: YAML, presets and defaults, overrides, types."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flm_megatron.config.fields import DEFAULTS
from flm_megatron.config.home import expand_paths
from flm_megatron.config.messages import explain
from flm_megatron.config.overrides import Overrides, apply_overrides, stage_name
from flm_megatron.config.presets import load_preset
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.config.yaml_text import format_yaml, parse_yaml, read_yaml
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.json_text import Json, JsonObject

_RUN = TypeAdapter(RunConfig)
_STAGE = TypeAdapter(StageConfig)


def load_run(path: str | Path, overrides: Overrides = ()) -> RunConfig:
    """The run that a file describes, with overrides (see `Overrides`) applied and `~` in paths replaced.

    The key `defaults` at the top is merged under every stage, the preset that a stage names comes over it, and
    the stage's own keys and the overrides over both.

    Raises:
        RequestError: no such file, not YAML, an unknown key or preset, or values of the wrong type (all are listed).
    """
    source = str(path)
    document = parse_yaml(_read(source), source)
    if not isinstance(document, dict):
        raise RequestError(f"{source}: a run file is a mapping of keys, this is {document!r:.60}")
    apply_overrides(document, overrides)
    merged, mistakes = _merged(document)
    try:
        run = _RUN.validate_python(merged)
    except ValidationError as error:
        mistakes += explain(error)
    if mistakes:
        raise Mistakes(mistakes, source)
    expand_paths(run, source)
    return run


def _read(source: str) -> str:
    try:
        return read_yaml(source)
    except UnicodeDecodeError:
        raise RequestError(f"{source}: not UTF-8 text, so not a run file") from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL, RuntimeError: the home of nobody
        raise RequestError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _merged(document: JsonObject) -> tuple[JsonObject, list[str]]:
    """The document with presets and defaults merged into its stages and both keys gone, and what is wrong with them.

    A preset or defaults that are wrong are left out, so that they hide no other mistake.
    """
    document = dict(document)
    defaults = document.pop(DEFAULTS, None) or {}
    mistakes = _default_mistakes(defaults)
    if mistakes:
        defaults = {}
    stages = document.get("stages")
    if isinstance(stages, list):
        document["stages"] = [_merged_stage(stage, defaults, mistakes) for stage in stages]
    return document, mistakes


def _default_mistakes(defaults: Json) -> list[str]:
    """Defaults have to make a stage by themselves, so that a mistake is named where it stands."""
    if not isinstance(defaults, dict):
        return [f"{DEFAULTS}: {defaults!r:.60} does not fit, expected the fields of a stage"]
    try:
        _STAGE.validate_python(defaults)
    except ValidationError as error:
        return explain(error, of=(DEFAULTS,))
    return []


def _merged_stage(stage: Json, defaults: JsonObject, mistakes: list[str]) -> Json:
    """One stage over its preset over the defaults; an unknown preset is added to the `mistakes`."""
    if not isinstance(stage, dict):
        return stage  # its type is refused with everything else's
    own = {key: value for key, value in stage.items() if key != "preset"}
    if "preset" in stage:
        own["name"] = stage_name(stage)
        try:
            defaults = _over(load_preset(stage["preset"]), defaults)
        except RequestError as error:
            mistakes.append(str(error))
            own["name"] = str(own["name"])
    return _over(own, defaults)


def _over(upper: JsonObject, lower: JsonObject) -> JsonObject:
    """`upper` laid over `lower`: sections key by key, anything else replaced."""
    merged = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
        merged[key] = _over(value, below) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def run_from_dict(data: JsonObject, source: str = "run") -> RunConfig:
    """The run of plain data as `run_to_dict` makes it; `source` names it in errors.

    Raises:
        RequestError: an unknown key or a value of the wrong type.
    """
    try:
        return _RUN.validate_python(data)
    except ValidationError as error:
        raise Mistakes(explain(error), source) from None


def run_to_dict(run: RunConfig) -> JsonObject:
    """The run as plain data (mappings, lists, text and numbers), fit for JSON and YAML."""
    return _RUN.dump_python(run, mode="json")


def dump_run(run: RunConfig) -> str:
    """The run as the YAML text of a run file with every field, which reads back as the same run."""
    return format_yaml(run_to_dict(run))


def resolve_vocabulary(run: RunConfig, vocab_size: int) -> RunConfig:
    """The run with the tokenizer's vocabulary in every model that leaves it open.

    A model may state more ids than the tokenizer has, as published ones do whose embedding was rounded up.

    Raises:
        RequestError: a model states fewer.
    """
    for index, stage in enumerate(run.stages):
        if stage.model.vocab_size is not None and stage.model.vocab_size < vocab_size:
            raise RequestError(
                f"stages.{index}.model.vocab_size is {stage.model.vocab_size}, the tokenizer's is {vocab_size}: "
                "set vocab_size to null, or give the tokenizer that belongs to the model"
            )
    stages = [
        dataclasses.replace(
            stage, model=dataclasses.replace(stage.model, vocab_size=stage.model.vocab_size or vocab_size)
        )
        for stage in run.stages
    ]
    return dataclasses.replace(run, stages=stages)
