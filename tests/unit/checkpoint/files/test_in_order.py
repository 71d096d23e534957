"""Work in threads with results in order: no more under way than is held, an error in its turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from flm_megatron.checkpoint.files.in_order import WORKERS, in_order


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """The threads that reading uses."""
    with ThreadPoolExecutor(WORKERS) as threads:
        yield threads


@pytest.mark.parametrize("count", range(6))
def test_every_item_comes_once_and_in_order(executor: ThreadPoolExecutor, count: int) -> None:
    assert list(in_order(executor, str, iter(range(count)))) == [(i, str(i)) for i in range(count)]


def test_an_item_that_takes_longer_does_not_change_the_order(executor: ThreadPoolExecutor) -> None:
    second_is_done = threading.Event()

    def work(item: int) -> int:
        """The first waits for the second, which so runs beside it."""
        second_is_done.set() if item == 1 else second_is_done.wait(10)
        return 10 * item

    assert list(in_order(executor, work, range(4))) == [(0, 0), (1, 10), (2, 20), (3, 30)]


def test_no_more_is_taken_than_is_under_way(executor: ThreadPoolExecutor) -> None:
    """What a result holds, such as a region's values, stays in memory until it is asked for."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(10):
            taken += 1
            yield item

    results = in_order(executor, str, items())
    assert taken == 0
    for done in range(10):
        assert next(results) == (done, str(done))
        assert taken == min(done + 3, 10)  # the one that was given, and two beside the reader


def test_an_error_comes_in_its_turn(executor: ThreadPoolExecutor) -> None:
    results = in_order(executor, lambda item: 12 // item, [3, 2, 0, 1])
    assert [next(results), next(results)] == [(3, 4), (2, 6)]
    with pytest.raises(ZeroDivisionError):
        next(results)
