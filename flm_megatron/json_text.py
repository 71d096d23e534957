"""JSON from files of others, where an error is one line that names the place, and JSON for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from flm_megatron.errors import FlmError, RequestError

DEEPEST = 100
"""Deepest nesting: this program reads nothing deeper, and printing or comparing it would fail."""
MOST_DIGITS = 18  # of an integer, so that it fits into 64 bits
Json = Any
"""A JSON or YAML value as it was parsed: their readers give it no type."""
JsonObject = dict[str, Any]
"""A JSON or YAML object as it was parsed: their readers give its values no type."""


def parse_json(
    text: str | bytes, where: str, error: type[FlmError] = RequestError, strict: bool = False, name: str = "JSON"
) -> Json:
    """The value of a JSON text; `where` and `name` tell in errors what it is, `error` is raised when it is none.

    `strict`, for what the program relies on: no key twice (of which the last would count), integers of 64 bits.
    """
    pairs, integer = (_unique, _integer) if strict else (None, None)
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer)
        if text.count("[") + text.count("{") > DEEPEST:  # fewer cannot be deeper
            _check_depth(value)
        return value
    except json.JSONDecodeError as problem:
        line = f"line {problem.lineno}, " if problem.lineno > 1 else ""
        raise error(f"{where} is not {name}: {problem.msg} at {line}column {problem.colno}") from None
    except UnicodeDecodeError as problem:
        byte = problem.object[problem.start]
        raise error(f"{where} is not UTF-8: byte 0x{byte:02x} at column {problem.start + 1}") from None
    except RecursionError:
        raise error(f"{where} is not {name} that can be read: brackets are nested more than {DEEPEST} deep") from None
    except ValueError as problem:  # a key that stands twice, or a number of more digits than are read
        raise error(f"{where} is not {name} that can be read: {str(problem).partition(';')[0]}") from None


def json_document(data: object) -> str:
    """A document for other programs. Numbers that JSON does not have, infinite ones and NaN, become null; what else it
    does not have, such as paths, becomes text."""
    return json.dumps(_plain(data), indent=1, default=str, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _unique(pairs: Iterable[tuple[str, Json]]) -> JsonObject:
    found: JsonObject = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} is given twice")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Json) -> None:
    """Raise RecursionError unless brackets end within DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for outer in level
            if isinstance(outer, dict | list)
            for part in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError
