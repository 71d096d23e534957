"""Walking over a matrix some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Values of one chunk: its fp32 temporaries fit a core's cache, and the calls for it cost little beside the work.
CHUNK_VALUES = 1 << 18


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows of about `CHUNK_VALUES` values each on a CPU; a GPU takes all rows at once."""
    rows, columns = matrix.shape
    step = max(CHUNK_VALUES // max(columns, 1), 1) if matrix.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + step) for start in range(0, rows, step))
