"""YAML as run files use it: `1e-4` and `2.5e12` are numbers, and a key may be given once only."""

from __future__ import annotations

import re
from typing import Any

import yaml

from flm_megatron.errors import RequestError


class RunFileLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2 (1.1 reads `1e-4` as text) and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with text for keys; a key that stands twice is an error rather than the last one winning."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return {str(key): value for key, value in super().construct_mapping(node, deep=deep).items()}


RunFileLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Plain data of a YAML document; `source` names it in errors.

    Raises:
        RequestError: not YAML, or a repeated key, with line and column.
    """
    try:
        return yaml.load(text, Loader=RunFileLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RequestError(f"{source}{place}: {problem}") from None


def format_yaml(data: Any, flow: bool = False) -> str:
    """YAML text of plain data, keys in their order, which `parse_yaml` reads back; in braces with `flow`."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120, default_flow_style=flow)
