"""Standard streams that another's code cannot write to."""

from __future__ import annotations

import os
from typing import BinaryIO, TextIO


def private_streams() -> tuple[BinaryIO, TextIO]:
    """Input and output for the caller alone: libraries find both closed, and what they print is lost."""
    words = os.fdopen(os.dup(0), "rb")
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    return words, lines
