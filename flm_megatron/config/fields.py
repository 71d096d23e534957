"""The fields of the run file as its dataclasses declare them: paths, types in words, defaults and help texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from flm_megatron.config.schema import RunConfig, StageConfig

DEFAULTS = "defaults"
"""Key at the top of a run file whose fields are merged under every stage."""

WORDS: dict[object, str] = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: its dotted path (without list indices), type in words, default as plain data, and help text."""

    path: str
    type: str
    default: object
    help: str


def all_fields(owner: type = RunConfig, prefix: str = "") -> Iterator[Field]:
    """Every field of the run file below the dataclass `owner`, sections before what is in them."""
    for name, info in owner.__pydantic_fields__.items():  # type: ignore[attr-defined]
        path = f"{prefix}{name}"
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        plain = "" if dataclasses.is_dataclass(default) else default
        yield Field(
            path, type_words(info.annotation), "required" if info.is_required() else plain, info.description or ""
        )
        section = section_of(info.annotation)
        if section is not None:
            yield from all_fields(section, f"{path}.")


def type_words(annotation: object) -> str:
    """What a value of this type is, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is Annotated:
        return type_words(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(type_words(part) for part in parts)
    if origin is list:
        return f"list of {type_words(parts[0])}"
    if origin is tuple:
        return f"list of {len(parts)} {type_words(parts[0])}s"
    if dataclasses.is_dataclass(annotation):
        return "section"
    return WORDS[annotation]


def section_of(annotation: object) -> type | None:
    """The dataclass that an annotation is, or holds as an option or in a list; none for a plain value."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    found = (section_of(part) for part in get_args(annotation) if part is not NoneType)
    return next((section for section in found if section), None)


def resolve_field(location: Sequence[str | int]) -> tuple[str, object]:
    """Dotted path and annotation of the deepest field on the way to `location`, such as ("stages", 0, "tokens").

    Inside a list of sections the path keeps the index; inside a list of values it ends at the list.
    """
    owner: type | None = RunConfig
    path: list[str] = []
    annotation: object = RunConfig
    for part in location:
        if part == DEFAULTS and owner is RunConfig:
            path.append(part)
            annotation = owner = StageConfig
        elif isinstance(part, int) and owner is not None:
            path.append(str(part))
            annotation = owner
        elif owner is not None and part in owner.__pydantic_fields__:  # type: ignore[attr-defined]
            annotation = owner.__pydantic_fields__[part].annotation  # type: ignore[attr-defined]
            path.append(str(part))
            owner = section_of(annotation)
        else:
            break
    return ".".join(path), annotation
