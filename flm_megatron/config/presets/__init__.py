"""Stages known by name: published models and small ones, each a YAML file beside this one."""

from __future__ import annotations

from importlib.resources import files

from flm_megatron.config.messages import nearest
from flm_megatron.config.yaml_text import parse_yaml
from flm_megatron.errors import RequestError
from flm_megatron.json_text import Json, JsonObject

_SUFFIX = ".yaml"


def preset_names() -> list[str]:
    """Names that `preset:` in a stage may have."""
    found = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))


def load_preset(name: Json) -> JsonObject:
    """Fields of a stage as plain data.

    Raises:
        RequestError: no preset has this name.
    """
    if name not in preset_names():
        raise RequestError(f"preset {name!r} is not known, {nearest(str(name), preset_names())}")
    text = files(__name__).joinpath(f"{name}{_SUFFIX}").read_text(encoding="utf-8")
    return parse_yaml(text, f"preset {name}")
