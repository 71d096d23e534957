"""A bar with bytes per second and time left, on a terminal."""

from __future__ import annotations

from tqdm import tqdm

from flm_megatron.checkpoint.workers import Workers


def progress_bar(label: str, nbytes: int, workers: Workers) -> tqdm:
    """A bar over `nbytes` bytes of which every process moves an equal part; `update(n)` counts what this one moved.

    Only the first process shows it, of its own part, on standard error, and only where that is a terminal.
    """
    return tqdm(
        desc=label,
        total=nbytes // workers.size,
        unit="B",
        unit_scale=True,
        disable=True if workers.rank else None,
        leave=False,
    )
