"""Walking over a matrix some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from flm_megatron.device.chunks import CHUNK_VALUES


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows of about `CHUNK_VALUES` values each."""
    rows, columns = matrix.shape
    step = max(CHUNK_VALUES.get(matrix.device.type, CHUNK_VALUES["cuda"]) // max(columns, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))
