"""Operations of ours in the places where megatron-core calls others, and the others back for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_shipped: dict[tuple[ModuleType, str], object] = {}
MISSING = object()


def replace(module: ModuleType, **values: object) -> None:
    """Give names of one of the engine's modules these values from now on."""
    for name, value in values.items():
        _shipped.setdefault((module, name), getattr(module, name, MISSING))
        setattr(module, name, value)


@contextmanager
def as_shipped() -> Iterator[None]:
    """While the block runs, every name has the value that the engine itself gives it."""
    ours = {(module, name): getattr(module, name) for module, name in _shipped}
    try:
        for (module, name), value in _shipped.items():
            delattr(module, name) if value is MISSING else setattr(module, name, value)
        yield
    finally:
        for (module, name), value in ours.items():
            setattr(module, name, value)
