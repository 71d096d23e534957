"""Whether the rank before this one is there: its kernel answers for it, however busy it is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from flm_megatron.launch import neighbour
from flm_megatron.launch.neighbour import BACKLOG, Neighbour


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Neighbour]]:
    """Three ranks of one store."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(neighbour, "ANSWER_S", 0.5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    made = [Neighbour(store, "here/{}".format, rank, 3) for rank in range(3)]
    yield made
    for rank in made:
        rank.close()


def test_ranks_that_do_nothing_are_there(ranks: list[Neighbour]) -> None:
    assert not any(rank.gone() for rank in ranks for _ in range(2))


def test_one_that_ended_is_missed_by_the_rank_after_it_alone(ranks: list[Neighbour]) -> None:
    ranks[2].close()
    assert [rank.gone() for rank in ranks[:2]] == [True, False]


def test_one_that_left_in_order_is_not_missed(ranks: list[Neighbour]) -> None:
    ranks[2].leave()
    ranks[2].close()
    assert not ranks[0].gone()


def test_who_does_not_answer_is_gone(ranks: list[Neighbour]) -> None:
    for _ in range(BACKLOG + 2):  # until the kernel takes no more connections
        gone = ranks[1].gone()
    assert gone


def test_looking_goes_on_for_as_long_as_the_other_clears_its_port(ranks: list[Neighbour]) -> None:
    for _ in range(BACKLOG + 50):
        assert not ranks[1].gone()
        ranks[0].gone()


def test_a_rank_alone_misses_nobody(ranks: list[Neighbour]) -> None:
    alone = Neighbour(ranks[0].store, "alone/{}".format, 0, 1)
    assert not alone.gone()
    alone.close()
