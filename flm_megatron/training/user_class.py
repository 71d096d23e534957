"""Classes of the user, which the run file names by PACKAGE.MODULE.CLASS."""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

from flm_megatron.errors import RequestError, one_line

T = TypeVar("T")


def user_class(path: str, base: type[T], field: str) -> type[T]:
    """Import the class at `path`, a subclass of `base`, for an entry of the run file's `field`.

    Raises:
        RequestError: it cannot be imported, is of another kind, or cannot be made without arguments.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # the user's module may raise anything
        raise RequestError(
            one_line(
                f"{field}: {path} cannot be imported: {error}; give PACKAGE.MODULE.CLASS, installed or on PYTHONPATH"
            )
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        where = base.__module__.rpartition(".")[0]
        raise RequestError(f"{field}: {path} is no {base.__name__.lower()}: derive it from {where}.{base.__name__}")
    try:
        found()
    except Exception as error:
        raise RequestError(one_line(f"{field}: {path}() cannot be made: {error}")) from error
    return found
