"""What `run_pickle` makes in place of objects: records of what a pickle says, which do nothing."""

from __future__ import annotations

from typing import Any, TypeVar

K = TypeVar("K")
Unpickled = Any
"""What a pickle says, or the value made of it: a pickle gives its parts no type."""
SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
LARGEST_KEY = 2**64  # integers far above it can be chosen so that all fall into one slot of a dictionary
STORAGE = "<storage>"
"""Path of the record that a persistent id, which is how torch names a storage, becomes."""


class PickleError(ValueError):
    """A pickle that is broken or asks for what this machine does not do."""


class Name:
    """A global that a pickle names, such as `torch.Size`: its dotted path and no more."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class Record:
    """An object as a pickle describes it: the path of its class or maker, arguments, items put into it, state.

    `items` are pairs for a mapping. Records are equal to themselves alone.
    """

    __slots__ = ("args", "items", "path", "state")

    def __init__(self, path: str, args: tuple[Unpickled, ...]) -> None:
        self.path, self.args = path, args
        self.state: Unpickled = None
        self.items: list[Unpickled] = []


def hashable(key: K) -> K:
    """`key` if its hash takes no time: tuples of tuples that share their parts would take 2^depth steps."""
    kind = type(key)
    if isinstance(key, int) and abs(key) > LARGEST_KEY:
        raise PickleError("an integer of more than 64 bits as a key")
    if isinstance(key, tuple) and all(type(part) is not tuple and hashable(part) is part for part in key):
        return key
    if kind in SCALARS or kind is Record or kind is Name:
        return key
    raise PickleError(f"a {kind.__name__} as a key")
