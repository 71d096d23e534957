"""When everything of a step begins and ends, beside the arithmetic of the schedules' papers."""

from __future__ import annotations

import random

import pytest

from flm_megatron.planner.simulation.events import Collective, Join, Meet, Simulation, Span, Task, Work, simulate
from flm_megatron.planner.simulation.extrapolate import quick_simulation, simulate_schedule
from flm_megatron.planner.simulation.schedule import Exchange, Pass, Schedule


def even(rank: int, done: Pass) -> float:
    """A backward pass of twice a forward pass's second, on every rank."""
    return 2.0 if done.backward else 1.0


def free(sender: int, receiver: int) -> float:
    """Transfers that take no time."""
    return 0.0


def parts_sum_to_the_step(found: Simulation) -> bool:
    """Whether each rank has worked or waited for all of the step."""
    return all(sum(rank.values()) == pytest.approx(found.seconds) for rank in found.ranks)


@pytest.mark.parametrize(("pipeline", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 5)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("overlaps", [True, False])
def test_the_bubble_is_that_of_the_papers(pipeline: int, chunks: int, groups: int, overlaps: bool) -> None:
    """arXiv 2104.04473: (pipeline - 1) forward and backward passes, divided by the number of chunks."""
    schedule = Schedule(pipeline, pipeline * groups, chunks, overlaps)
    found = simulate_schedule(schedule, lambda rank, done: even(rank, done) / chunks, free)
    bubble = 3.0 * (pipeline - 1) / chunks
    assert found.seconds == pytest.approx(3.0 * schedule.micro_batches + bubble)
    assert [rank["bubble"] for rank in found.ranks] == pytest.approx([bubble] * pipeline)
    assert parts_sum_to_the_step(found)


def test_transfers_of_1f1b_are_exposed_and_those_of_chunks_run_beside_passes() -> None:
    plain = simulate_schedule(Schedule(4, 64), even, lambda *_: 0.01)
    chunks = simulate_schedule(Schedule(4, 64, 2), lambda rank, done: even(rank, done) / 2, lambda *_: 0.01)
    # A middle rank exchanges twice per micro-batch: with the next rank, and with the one before.
    assert plain.ranks[1]["pipeline"] == pytest.approx(2 * 64 * 0.01, rel=0.05)
    assert all(rank["pipeline"] < 0.25 for rank in chunks.ranks)  # of warm-up and flush alone
    assert parts_sum_to_the_step(plain) and parts_sum_to_the_step(chunks)


def test_transfers_of_chunks_that_nothing_overlaps_are_exposed_once_for_both_directions() -> None:
    schedule = Schedule(4, 64, 2, overlaps=False)
    found = simulate_schedule(schedule, lambda rank, done: even(rank, done) / 2, lambda *_: 0.01)
    assert all(rank["pipeline"] == pytest.approx(2 * 64 * 0.01, rel=0.1) for rank in found.ranks)
    assert parts_sum_to_the_step(found)


def test_a_slow_rank_is_waited_for_by_the_others() -> None:
    found = simulate_schedule(Schedule(4, 50), lambda rank, done: even(rank, done) * (1.5 if rank == 2 else 1), free)
    # The other ranks' passes of one micro-batch, less the forward pass that it does while the last rank is at work.
    assert found.ranks[2]["bubble"] == pytest.approx(3 * 3.0 - 1.5)
    assert found.seconds == pytest.approx(50 * 4.5 + 3 * 3.0 - 1.5)
    assert min(found.ranks[rank]["bubble"] for rank in (0, 1, 3)) > 50 * 1.5


def test_a_transfer_waits_for_both_ranks_and_for_the_one_before_it() -> None:
    send, receive = Exchange(("send next",), waits=False), Exchange(("receive previous",))
    programs: list[list[Task]] = [[send, send, Work("more", 9.0)], [Work("busy", 1.0), receive, receive]]
    found = simulate(programs, even, lambda *_: 2.0, record=True)
    sent = [span for span in found.spans if span.stream == "pipeline"]
    assert sent == [Span(0, "pipeline", "activations", 1.0, 3.0), Span(0, "pipeline", "activations", 3.0, 5.0)]
    assert found.ranks[1] == {"compute": 1.0, "pipeline": 4.0, "bubble": 4.0}


def test_collectives_run_beside_work_and_are_exposed_where_they_are_waited_for() -> None:
    reduce = Collective("reduce-scatter", "data", 3.0)
    meet = Meet("norm", "model", 1.0)
    programs: list[list[Task]] = [
        [reduce, reduce, Work("backward", 4.0), Join("data"), meet],
        [Work("backward", 8.0), meet],
    ]
    found = simulate(programs, even, free)
    assert found.ranks[0] == {"compute": 4.0, "data": 2.0, "bubble": 2.0, "model": 1.0, "pipeline": 0.0}
    assert found.seconds == 9.0


def test_ranks_that_wait_for_ever_are_refused() -> None:
    with pytest.raises(ValueError, match="for ever"):
        simulate([[Exchange(("receive previous",))], []], even, free)


@pytest.mark.parametrize(("chunks", "slow"), [(1, None), (1, 0), (1, 3), (2, None), (2, 1)])
def test_few_micro_batches_say_what_many_take(chunks: int, slow: int | None) -> None:
    schedule = Schedule(4, 200, chunks)

    def seconds(rank: int, done: Pass) -> float:
        return even(rank, done) * (1.3 if rank == slow else 1.0)

    quick, whole = (
        simulating(schedule, seconds, lambda *_: 0.05) for simulating in (quick_simulation, simulate_schedule)
    )
    assert quick.seconds == pytest.approx(whole.seconds)
    for one, other in zip(quick.ranks, whole.ranks, strict=True):
        assert one == pytest.approx(other)


def test_ranks_that_are_little_different_are_simulated_whole() -> None:
    random_ = random.Random(0)
    for _ in range(20):
        pipeline, chunks = random_.choice([2, 5, 8]), random_.choice([1, 3])
        slower = [random_.uniform(1.0, random_.choice([1.01, 1.5])) for _ in range(pipeline)]
        schedule = Schedule(pipeline, pipeline * 16, chunks)
        operands = schedule, lambda rank, done, slower=slower: even(rank, done) * slower[rank], lambda *_: 0.02
        assert quick_simulation(*operands).seconds == pytest.approx(simulate_schedule(*operands).seconds)


def test_so_is_a_long_pipeline_that_the_first_ranks_slow_down() -> None:
    """64 layers on 56 ranks: 8 of them have 2, the ends embedding and head besides."""
    layers = [2.08, *[2.0] * 7, *[1.0] * 47, 1.7]
    operands = Schedule(56, 256), lambda rank, done: even(rank, done) * layers[rank], lambda *_: 0.02
    assert quick_simulation(*operands).seconds == pytest.approx(simulate_schedule(*operands).seconds)
