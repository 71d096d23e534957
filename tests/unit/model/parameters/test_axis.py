"""How an axis is cut: the shards of all ranks are the whole axis; the vocabulary is padded before."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_megatron.model.parameters import Axis, Band, Cut, Unit
from flm_megatron.model.parameters.axis import padded_vocab_size


@pytest.mark.parametrize(("tensor", "padded"), [(1, 80_000), (4, 80_384), (8, 80_896), (16, 81_920), (32, 81_920)])
def test_padded_vocabulary_is_as_in_the_releases(tensor: int, padded: int) -> None:
    assert padded_vocab_size(80_000, tensor) == padded


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_padding_is_the_least_that_splits(vocab: int, tensor: int) -> None:
    padded = padded_vocab_size(vocab, tensor)
    assert padded % (128 * tensor) == 0
    assert vocab <= padded < vocab + 128 * tensor


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Axis, int]:
    """An axis and a number of ranks that it can be cut over."""
    tensor, cut = draw(st.integers(1, 4)), draw(st.sampled_from(Cut))
    bands, groups = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)), 1
    if cut is Cut.BANDS:
        bands = [size * tensor for size in bands]
    if cut is Cut.GROUPS:
        groups = tensor * draw(st.integers(1, 3))
    return Axis(Unit.FFN, tuple(Band(size) for size in bands), groups, cut=cut), tensor


@given(cuts())
def test_the_shards_are_the_axis(case: tuple[Axis, int]) -> None:
    axis, tensor = case
    held = [
        [index for first, count in axis.shards(tensor, rank) for index in range(first, first + count)]
        for rank in range(tensor)
    ]
    if axis.cut is Cut.WHOLE:
        assert all(indices == list(range(axis.size)) for indices in held)
    else:
        assert sorted(itertools.chain(*held)) == list(range(axis.size))
    assert axis.indivisible(tensor) is None


def test_each_band_is_cut() -> None:
    axis = Axis(Unit.FFN, (Band(6, "gate"), Band(6, "up")), cut=Cut.BANDS)
    assert axis.shards(3, 1) == [(2, 2), (8, 2)]
    assert axis.indivisible(4) == 6


def test_groups_stay_whole() -> None:
    axis = Axis(Unit.HEAD, (Band(8, "query"), Band(4, "key"), Band(4, "value")), 6, cut=Cut.GROUPS)
    assert axis.shards(3, 1) == [(32, 32)]
    assert axis.indivisible(4) == 6


def test_padding_is_nobodys() -> None:
    """300 rows over 2 ranks are padded to 512; to 608 if the files say so."""
    axis = Axis(Unit.VOCABULARY, (Band(300),), cut=Cut.PADDED)
    assert [axis.shards(2, rank) for rank in (0, 1)] == [[(0, 256)], [(256, 44)]]
    assert [axis.shards(2, rank, 608) for rank in (0, 1)] == [[(0, 300)], [(300, 0)]]
