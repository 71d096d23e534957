"""Processes that tell each other over a store: many ranks as threads, each with its own end of the channel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from flm_megatron.distributed.channels import VALUE_BYTES, WINDOW, StoreChannel
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import DamagedError, FlmError, Mistakes


def store_of(kind: str) -> dist.Store:
    """A store that threads can share."""
    return dist.HashStore() if kind == "hash" else dist.TCPStore("localhost", 0, is_master=True)


def on_ranks(store: dist.Store, size: int, work: Callable[[Processes], Any], patience_s: float = 60) -> list[Any]:
    """What `work` returns on each of `size` ranks, or the error that it raises there."""
    channels = [StoreChannel(store, rank, size, timedelta(seconds=patience_s)) for rank in range(size)]

    def run(channel: StoreChannel) -> Any:
        try:
            return work(Processes(channel))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as executor:
        return list(executor.map(run, channels))


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_results_are_gathered_and_told_over_and_over_and_nothing_piles_up(kind: str) -> None:
    store = store_of(kind)
    keys: list[int] = []

    def work(processes: Processes) -> list[Any]:
        found: list[Any] = []
        for turn in range(4):
            parts = processes.together(partial(tuple, (turn, processes.rank)))
            found.append(processes.on_first(partial(list, parts)))
            if processes.rank == 0:
                keys.append(store.num_keys())
        return found

    size = WINDOW + 7
    expected = [[(turn, rank) for rank in range(size)] for turn in range(4)]
    assert on_ranks(store, size, work) == [expected] * size
    assert keys[0] == keys[-1] <= 4


def test_a_long_value_is_cut_and_comes_whole() -> None:
    store = store_of("tcp")
    value = bytes(range(256)) * (3 * VALUE_BYTES // 256) + b"end"

    def work(processes: Processes) -> bool:
        parts = processes.together(lambda: value + bytes([processes.rank]))
        told = processes.on_first(lambda: parts[2])
        processes.together(lambda: None)
        return told == value + b"\2"

    assert on_ranks(store, 3, work) == [True] * 3
    assert store.num_keys() <= 3


def test_a_failure_on_one_rank_is_one_on_all_and_they_stay_in_step() -> None:
    def work(processes: Processes) -> tuple[str, int]:
        def fail() -> None:
            if processes.rank == 3:
                raise DamagedError("a flipped bit")

        with pytest.raises(DamagedError) as caught:
            processes.together(fail)
        return str(caught.value), processes.on_first(lambda: 42)

    found = on_ranks(store_of("hash"), 6, work)
    assert [message for message, _ in found] == ["rank 3: a flipped bit"] * 3 + ["a flipped bit"] + [
        "rank 3: a flipped bit"
    ] * 2
    assert all(after == 42 for _, after in found)


def test_several_mistakes_that_the_first_rank_finds_are_a_wrong_request_on_all() -> None:
    def refuse() -> None:
        raise Mistakes(["seed was 1", "data was 2"], "cannot go on")

    found = on_ranks(store_of("hash"), 2, lambda processes: processes.on_first(refuse))
    assert [error.status for error in found] == [2, 2]
    assert str(found[1]) == "rank 0: cannot go on: 2 mistakes; seed was 1; data was 2"


def test_a_rank_that_is_gone_is_named_on_all_others_in_time() -> None:
    def work(processes: Processes) -> None:
        if processes.rank in (2, 4):
            return
        processes.together(lambda: None)

    found = on_ranks(store_of("hash"), 6, work, patience_s=0.3)
    assert found[2] is None and found[4] is None
    for rank in (0, 1, 3, 5):
        assert isinstance(found[rank], FlmError)
        assert "nothing came from ranks 2, 4 for 0.3 s" in str(found[rank])


def test_a_first_rank_that_is_gone_is_named_too() -> None:
    found = on_ranks(
        store_of("hash"), 3, lambda processes: processes.rank and processes.together(lambda: None), patience_s=0.15
    )
    assert [str(error) for error in found[1:]] == ["nothing came from rank 0 for 0.3 s"] * 2


def test_waiting_leaves_the_store_to_others() -> None:
    """Both threads of a rank have one client: one that waits in a save must not keep training from it."""
    server = dist.TCPStore("localhost", 0, is_master=True)
    client = dist.TCPStore("localhost", server.port, is_master=False)
    channel = StoreChannel(client, 1, 2, timedelta(seconds=60))
    waiting = threading.Thread(target=lambda: channel.broadcast(None))
    waiting.start()
    for _ in range(50):
        client.set("beat", "1")
        assert client.get("beat") == b"1"
    assert waiting.is_alive()
    StoreChannel(server, 0, 2).broadcast("go on")
    waiting.join(10)
    assert not waiting.is_alive()
