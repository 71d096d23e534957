"""Whether the rank before this one is there: its kernel answers for it, however busy it is."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
    monkeypatch.setattr(neighbour, "ANSWER_S", 0.2)
    monkeypatch.setattr(neighbour, "PATIENCE_S", 0.5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    made = [Neighbour(store, "here/{}".format, rank, 3) for rank in range(3)]
    yield made
    for rank in made:
        rank.close()


def lose_connection(rank: Neighbour) -> None:
    """As where keepalive has given up."""
    assert rank._connection is not None
    rank._connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def no_more_connections(rank: Neighbour) -> Iterator[None]:
    """Within the block the rank's kernel answers nobody: its queue is full."""
    with ExitStack() as stack:
        for _ in range(BACKLOG + 2):
            with suppress(OSError):
                stack.enter_context(socket.create_connection(rank.socket.getsockname(), 0.05))
        yield


def test_ranks_that_do_nothing_are_there_however_often_one_looks(ranks: list[Neighbour]) -> None:
    assert not any(ranks[1].gone() for _ in range(BACKLOG + 50))
    assert not any(rank.gone(at_once) for rank in ranks for at_once in (False, True))
    assert not any(rank.lost() for rank in ranks)


def test_one_that_ended_is_missed_by_the_rank_after_it_alone(ranks: list[Neighbour]) -> None:
    assert not any(rank.gone() for rank in ranks)
    ranks[2].close()
    assert [rank.lost() for rank in ranks[:2]] == [rank.gone() for rank in ranks[:2]] == [True, False]


@pytest.mark.parametrize(("in_order", "missed"), [(True, [False, False]), (False, [False, True])])
def test_one_that_said_that_it_ends_is_not_missed(ranks: list[Neighbour], in_order: bool, missed: list[bool]) -> None:
    """But by a rank that was told to stop: it may wait for one that ended by an error."""
    assert not ranks[0].gone()
    ranks[2].leave(in_order)
    ranks[2].close()
    assert [ranks[0].gone(at_once) for at_once in (False, True)] == missed


def test_who_does_not_answer_is_gone_after_a_while(ranks: list[Neighbour]) -> None:
    assert not ranks[1].gone()
    with no_more_connections(ranks[0]):
        assert not ranks[1].gone()  # the old one stands
        assert ranks[1].gone(at_once=True)
        lose_connection(ranks[1])
        assert [ranks[1].gone() for _ in range(6)] in ([False] * n + [True] * (6 - n) for n in (2, 3, 4))


def test_who_answers_again_was_never_gone(ranks: list[Neighbour]) -> None:
    assert not ranks[1].gone()
    with no_more_connections(ranks[0]):
        lose_connection(ranks[1])
        assert not ranks[1].gone() and ranks[1].lost()
    ranks[0].gone()
    time.sleep(0.5)
    assert not ranks[1].gone() and not ranks[1].lost()


def test_who_was_never_reached_is_not_missed(ranks: list[Neighbour]) -> None:
    """As behind a firewall; a launcher that tells to stop knows better."""
    ranks[2].close()
    assert not ranks[0].gone() and not ranks[0].lost() and ranks[0].gone(at_once=True)


def test_looking_anew_goes_on_for_as_long_as_the_other_clears_its_port(ranks: list[Neighbour]) -> None:
    for _ in range(BACKLOG + 50):
        assert not ranks[1].gone(at_once=True)
        ranks[0].gone()


def test_a_rank_alone_misses_nobody(ranks: list[Neighbour]) -> None:
    alone = Neighbour(ranks[0].store, "alone/{}".format, 0, 1)
    assert not alone.gone()
    alone.close()
