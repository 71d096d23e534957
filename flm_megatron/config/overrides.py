"""Overrides: `--stages.0.parallel.tensor 2`, `--stages.52b.tokens=1e9` on the command line, a mapping in Python."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flm_megatron.config.messages import nearest
from flm_megatron.config.yaml_text import parse_yaml
from flm_megatron.errors import RequestError
from flm_megatron.json_text import Json, JsonObject

Overrides = Sequence[str] | Mapping[str, object]
"""Words as on the command line, or `{"stages.0.parallel.tensor": 2}`."""


def apply_overrides(document: JsonObject, overrides: Overrides) -> None:
    """Write overrides into the plain data of a run file, before presets and defaults are merged.

    Values of words are YAML, those of a mapping are themselves. An element of a list is named by its index, a stage
    also by its name.

    Raises:
        RequestError: not of the form `--path value`, or a path through something that has no parts.
    """
    for path, value in given_values(overrides):
        _assign(document, path.split("."), value, path)


def given_values(overrides: Overrides) -> Iterator[tuple[str, object]]:
    """Dotted path and plain value of each. Raises RequestError: not of the form `--path value`."""
    if isinstance(overrides, Mapping):
        for path, value in overrides.items():
            if not isinstance(path, str):
                raise RequestError(f"{path!r} is not the path of a field: give one such as 'stages.0.tokens'")
            yield path, os.fspath(value) if isinstance(value, os.PathLike) else copy.deepcopy(value)
        return
    for path, value in _pairs(overrides):
        yield path, parse_yaml(value, f"--{path}")


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = iter(overrides)
    for word in rest:
        if not word.startswith("--") or word == "--":
            raise RequestError(f"{word!r} is not an override: give --field value, such as --stages.0.tokens 1e9")
        path, equals, value = word[2:].partition("=")
        if not equals:
            given = next(rest, None)
            if given is None or given.startswith("--"):
                raise RequestError(f"--{path} has no value: give --{path} VALUE")
            value = given
        yield path, value


def _assign(place: Json, keys: list[str], value: object, path: str) -> None:
    """Set what `keys` lead to from `place`, making sections on the way where there are none."""
    for depth, key in enumerate(keys):
        if not isinstance(place, list | dict):
            raise RequestError(f"--{path}: {'.'.join(keys[:depth])} is {place!r}, which has no {key!r}")
        index: Any = _index(place, key, path) if isinstance(place, list) else key
        if depth == len(keys) - 1:
            place[index] = value
            return
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[index]


def _index(items: list[Json], key: str, path: str) -> int:
    index = element_index(items, key)
    if index is not None:
        return index
    if key.isdigit():
        raise RequestError(f"--{path}: there is no element {key}, the list has {len(items)} (0 to {len(items) - 1})")
    known = [name for name in map(stage_name, items) if name is not None]
    raise RequestError(f"--{path}: no element is named {key!r}, {nearest(key, known) if known else 'give an index'}")


def element_index(items: list[Json], key: str) -> int | None:
    """Index of the element that `key` names, by number or by name; none if there is none."""
    if key.isdigit():
        return int(key) if int(key) < len(items) else None
    names = [stage_name(item) for item in items]
    return names.index(key) if key in names else None


def stage_name(stage: Json) -> str | None:
    """Name of a stage as plain data; a stage from a preset that has no name of its own bears the preset's."""
    return stage.get("name", stage.get("preset")) if isinstance(stage, dict) else None
