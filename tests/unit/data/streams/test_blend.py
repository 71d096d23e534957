"""Orders that can be asked for at any place: permutations and blends."""

from __future__ import annotations

import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.data.streams.blend import BLOCK, Blend
from flm_megatron.data.streams.permutation import Permutation
from flm_megatron.engine.prepare import prepare


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 2000), key=st.text(max_size=8))
def test_a_permutation_has_every_number_once(size: int, key: str) -> None:
    """For any size and key."""
    order = Permutation(size, key)
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_permutations_look_random_and_differ_by_key() -> None:
    """No correlation with place or among keys, beyond 4 standard deviations; few fixed points."""
    size = 5000
    orders = [[Permutation(size, f"7/a/{epoch}")[i] for i in range(size)] for epoch in range(4)]
    correlations = numpy.corrcoef([*orders, range(size)])
    assert numpy.abs(correlations - numpy.eye(5)).max() < 4 / size**0.5
    assert all(sum(value == place for place, value in enumerate(order)) < 8 for order in orders)


def test_a_permutation_of_half_a_billion_needs_no_array() -> None:
    """Places far apart are found at once."""
    order = Permutation(500_000_000, "key")
    found = [order[place] for place in range(0, 500_000_000, 5_000_001)]
    assert len(set(found)) == len(found) and max(found) < 500_000_000


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 10**12), start=st.integers(0, 10**12), key=st.text(max_size=4))
def test_many_places_at_a_time_are_the_same(size: int, start: int, key: str) -> None:
    """The numbers that are found one at a time."""
    order, start = Permutation(size, key), start % size
    stop = min(size, start + 50)
    assert order.places(start, stop).tolist() == [order[place] for place in range(start, stop)]


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def _sources(blend: Blend, count: int) -> numpy.ndarray:
    return numpy.array([blend[i][0] for i in range(count)])


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS)
def test_every_prefix_keeps_the_shares(weights: list[float]) -> None:
    """No source is further than the number of sources from its share; draws of a source count up by one."""
    blend = Blend(weights)
    sources = _sources(blend, 600)
    for source, share in enumerate(numpy.array(weights) / sum(weights)):
        counts = numpy.cumsum(sources == source)
        assert numpy.abs(counts - share * numpy.arange(1, 601)).max() <= max(1, len(weights) / 2)
        assert [blend[int(i)][1] for i in numpy.flatnonzero(sources == source)] == list(range(counts[-1]))


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5, 3, 1, 1], [0.7521, 0.0981, 0.0717, 0.0287, 0.0494]])
def test_counts_agree_with_the_engines_blending(weights: list[float]) -> None:
    """megatron-core's greedy blending has taken the same number from each source at every place, but for two."""
    prepare()
    from megatron.core.datasets import helpers_cpp

    size = 3000
    theirs, draws = numpy.zeros(size, dtype=numpy.int16), numpy.zeros(size, dtype=numpy.int64)
    shares = numpy.array(weights) / sum(weights)
    helpers_cpp.build_blending_indices(theirs, draws, shares, len(weights), size, False)
    ours = _sources(Blend(weights), size)
    for source in range(len(weights)):
        assert numpy.abs(numpy.cumsum(ours == source) - numpy.cumsum(theirs == source)).max() <= 2


def test_blocks_join_without_a_gap() -> None:
    """Around the border of two blocks the draws go on, and asking far first changes nothing."""
    weights = [0.5, 0.3, 0.2]
    whole, jumped = Blend(weights), Blend(weights)
    far = [jumped[i] for i in range(2 * BLOCK - 5, 2 * BLOCK + 5)]
    everything = [whole[i] for i in range(2 * BLOCK + 5)]
    assert everything[-10:] == far
    assert [jumped[i] for i in range(100)] == everything[:100]
    for source in range(3):
        draws = [draw for number, draw in everything if number == source]
        assert draws == list(range(len(draws)))
        assert whole.counts(len(everything))[source] == len(draws)


def test_a_place_far_in_is_found_at_once() -> None:
    """Sample 500 million costs one block."""
    start = time.perf_counter()
    blend = Blend([0.7521, 0.0981, 0.0717, 0.0287, 0.0494])
    _, draw = blend[500_000_000]
    assert draw > 0 and sum(blend.counts(500_000_001)) == 500_000_001
    assert time.perf_counter() - start < 5
