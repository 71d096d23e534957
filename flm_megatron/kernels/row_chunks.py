"""Walking over a matrix some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Values of one chunk. On a CPU its fp32 temporaries fit a core's cache, and the calls for it cost little beside the
# work; on a GPU they are small beside the model.
CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 26}


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows of about `CHUNK_VALUES` values each."""
    rows, columns = matrix.shape
    step = max(CHUNK_VALUES.get(matrix.device.type, CHUNK_VALUES["cuda"]) // max(columns, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))
