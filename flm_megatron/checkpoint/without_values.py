"""Reading without values: of a stored checkpoint its metadata alone is looked at, and nothing is drawn.

A rehearsal loads checkpoints this way: what would be read is noted, and tensors of its shape stand for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

Note = Callable[[Path | None, int], None]
"""Told of each region that would be read: the file that it lies in (none where values would be drawn), its bytes."""

_note: Note | None = None


@contextmanager
def without_values(note: Note) -> Iterator[None]:
    """While the block runs, readers in this process read nothing and draw nothing, and `note` is told what of."""
    global _note
    before, _note = _note, note
    try:
        yield
    finally:
        _note = before


def stand_in(file: Path | None, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor [*sizes] that stands for values of `file` (or drawn ones), with none of them; none where they are to
    be read."""
    if _note is None:
        return None
    values = torch.empty(sizes, dtype=dtype)
    _note(file, values.nbytes)
    return values
