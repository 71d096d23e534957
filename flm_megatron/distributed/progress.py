"""A bar with bytes per second and time left, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from flm_megatron.distributed.processes import Processes


@contextmanager
def progress_bar(label: str, nbytes: int, processes: Processes) -> Iterator[Callable[[int], None]]:
    """A progress bar over `nbytes` bytes, an equal shard for every process; gives a function that advances it.

    Only the first process shows it, for its own shard, on standard error and only on a terminal.
    """
    hidden = True if processes.rank else None
    with tqdm(
        desc=label, total=nbytes // processes.size, unit="B", unit_scale=True, disable=hidden, leave=False
    ) as bar:

        def moved(count: int) -> None:
            """Advance the bar by `count` bytes."""
            bar.update(count)

        yield moved
