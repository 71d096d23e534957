"""Works on items in a few threads and returns the results in the items' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

WORKERS = 2  # threads: while one waits for the disk the other computes
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    executor: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Items with the result of `work`; one more than WORKERS is in progress at a time.

    Raises what `work` raises, when its item's turn comes.
    """
    pending: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        pending.append((item, executor.submit(work, item)))
        if len(pending) > WORKERS:
            first, future = pending.popleft()
            yield first, future.result()
    for item, future in pending:
        yield item, future.result()
