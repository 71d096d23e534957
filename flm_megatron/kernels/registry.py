"""Which implementations an operation has: one row for each, which says what it needs and imports it when it is chosen.

An operation is declared in the `__init__` of its folder, with a Protocol of the functions that every implementation
has. Each row's `load` returns the implementation, a module as a rule, as that Protocol: mypy checks that it has these
functions with these arguments, and Triton or a library is imported only where it was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from flm_megatron.kernels import backends

Functions = TypeVar("Functions", covariant=True)


@dataclass(frozen=True)
class Implementation(Generic[Functions]):
    """A row of an operation's table."""

    load: Callable[[], Functions] | None
    """Imports and returns the implementation; none where megatron-core finds and calls it by itself."""
    also_needs: tuple[str, ...] = ()
    """Modules beyond those of its backend."""
    plain_only: bool = False
    """Whether it computes the bare operation alone. `auto` then runs the next one where more is asked for in a call."""


ENGINE_CALLS_IT: Implementation[NoReturn] = Implementation(None)
"""The row of an implementation that megatron-core finds and calls by itself."""


@dataclass(frozen=True)
class Operation(Generic[Functions]):
    """A fused operation: its name in a run file's `kernels`, and its implementations by backend, best first."""

    name: str
    implementations: Mapping[str, Implementation[Functions]]

    def __post_init__(self) -> None:
        OPERATIONS[self.name] = self

    def obstacle(self, backend: str, device: str) -> str | None:
        """Why the implementation in `backend` cannot run on `device`; none if it can."""
        return backends.obstacle(backend, device, self.implementations[backend].also_needs)

    def load(self, backend: str) -> Functions:
        """The functions of the implementation in `backend`."""
        load = self.implementations[backend].load
        assert load is not None, f"megatron-core runs {self.name} in {backend}"
        return load()


OPERATIONS: dict[str, Operation[object]] = {}
"""Every operation by its name. They enter themselves, and `kernels/__init__.py` imports them all."""
