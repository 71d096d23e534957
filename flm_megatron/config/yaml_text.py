"""YAML as run files use it: `1e-4` and `2.5e12` are numbers, and a key may be given once only."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from flm_megatron.errors import RequestError
from flm_megatron.json_text import Json

LONGEST = 2**18  # characters; a run file has a few thousand
MOST_NODES = 100_000
DEEPEST = 100


class RunFileLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2 (1.1 reads `1e-4` as text) and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Json, Json]:
        """A mapping with text for keys; a key that stands twice is an error rather than the last one winning."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key has to be text", key.start_mark)
            if str(key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return {str(key): value for key, value in super().construct_mapping(node, deep=deep).items()}


RunFileLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> str:
    """The text of a YAML file, no more of it than `parse_yaml` takes. Raises OSError and UnicodeDecodeError."""
    with Path(path).expanduser().open(encoding="utf-8") as file:
        return file.read(LONGEST + 1)


def parse_yaml(text: str, source: str) -> Json:
    """Plain data of a YAML document; `source` names it in errors.

    Raises:
        RequestError: not YAML, or a repeated key, with line and column; too long, too deep or too often repeated.
    """
    if len(text) > LONGEST:
        raise RequestError(f"{source}: has more than {LONGEST:,} characters, which is no such file")
    try:
        loader = RunFileLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root, {})
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RequestError(f"{source}{place}: {problem}") from None
    except RecursionError:
        raise RequestError(f"{source}: brackets or sections are nested more than {DEEPEST} deep") from None
    except ValueError as error:  # such as a date that there is not, or an integer of more digits than Python reads
        raise RequestError(f"{source}: {str(error).partition(';')[0]}") from None


def _check_size(node: yaml.Node, sizes: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """How many nodes there are, and how deep, with every alias written out: a few lines of aliases may say 10^9.

    `sizes` are those of nodes that were met. Raises RecursionError for too deep a document, YAMLError for too large a
    one, or one that holds itself.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    if depth > DEEPEST:
        raise RecursionError
    sizes[id(node)] = MOST_NODES, 0  # for one that holds itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    inner = [_check_size(child, sizes, depth + 1) for child in children]
    count, height = 1 + sum(size[0] for size in inner), 1 + max((size[1] for size in inner), default=0)
    if count > MOST_NODES:
        problem = f"more than {MOST_NODES:,} values with all aliases written out"
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    if height > DEEPEST:
        raise RecursionError
    sizes[id(node)] = count, height
    return count, height


def format_yaml(data: object, flow: bool = False) -> str:
    """YAML text of plain data, keys in their order, which `parse_yaml` reads back; in braces with `flow`."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120, default_flow_style=flow)
