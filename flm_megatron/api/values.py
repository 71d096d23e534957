"""Values of arguments that a command line would have refused before the function is called."""

from __future__ import annotations

import math
from collections.abc import Collection

from flm_megatron.config.ranges import LARGEST_MODEL, shown
from flm_megatron.errors import RequestError


def require_whole(name: str, value: int | None, largest: int = 2**63 - 1) -> None:
    """Check that an argument, if given, is a whole number from 1 to `largest`. Raises RequestError if not."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r}: give a whole number")
    if not 1 <= value <= largest:
        raise RequestError(f"{name} is {shown(value)}: give a number from 1 to {largest}")


def require_vocabulary(value: int | None) -> None:
    """Check a vocabulary size, if given. Raises RequestError if it is none."""
    require_whole("vocab_size", value, LARGEST_MODEL["vocab_size"])


def require_above_zero(name: str, value: float | None) -> None:
    """Check that an argument, if given, is a finite number above 0. Raises RequestError if not."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise RequestError(f"{name} is {value!r}: give a number above 0")


def require_one_of(name: str, value: str, known: Collection[str]) -> None:
    """Check that an argument is one of a few words. Raises RequestError if not."""
    if value not in known:
        raise RequestError(f"{name} is {value!r}: give one of {', '.join(known)}")
