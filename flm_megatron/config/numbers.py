"""Numbers in the run file are numbers: `true` is not 1.

pydantic takes booleans for 1 and 0. With its strict types `tokens: 2.0e12` would no longer be an integer; so every
integer and number of the schema has a check in front of it. How large numbers may be is for `ranges`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Union, get_args, get_origin, get_type_hints

import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a boolean is not a number")
    return value


CHECK = BeforeValidator(_number)


def checked(annotation: object) -> object:
    """`annotation` with the check in front of every integer and number in it, but for one beside a boolean."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        return Annotated[annotation, CHECK]
    if origin in (Union, UnionType):
        return annotation if bool in parts else Union[tuple(map(checked, parts))]  # noqa: UP007
    if origin in (list, tuple, dict):
        return origin[tuple(map(checked, parts))]
    return annotation


def number_checked(*, config: ConfigDict) -> Callable[[type], type]:
    """pydantic's `dataclass`, with numbers that are `checked`."""

    def decorate(cls: type) -> type:
        """The class as a dataclass whose numbers are checked by their annotations."""
        hints = get_type_hints(cls, include_extras=True)
        cls.__annotations__ = {name: checked(hints[name]) for name in cls.__annotations__}
        return pydantic.dataclasses.dataclass(config=config)(cls)

    return decorate


if TYPE_CHECKING:  # whose fields a type checker knows how to read
    from pydantic.dataclasses import dataclass as dataclass
else:
    dataclass = number_checked
