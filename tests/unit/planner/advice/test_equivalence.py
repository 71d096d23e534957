"""The bound by equality of losses: against its closed form, the condition on slopes, and runs played through."""

from __future__ import annotations

import numpy as np
import pytest

from flm_megatron.planner.advice.equivalence import LEAST_LARGE, Kept, Pair, best_growth
from flm_megatron.planner.advice.size_law import fit_size_law
from flm_megatron.planner.loss_law import BESIROGLU, HOFFMANN, LossLaw, SizeLaw

SMALL, LARGE, RATIO, TOKENS = 0.5e9, 1e9, 0.5, 100e9


def pair(law: SizeLaw) -> Pair:
    """The laws of both sizes."""
    return Pair(law.at(SMALL), law.at(LARGE))


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
def test_the_best_growth_has_its_closed_form(law: SizeLaw) -> None:
    """dD_0/dD_s = (D_0 / D_s)^(1 + b) = c_s / c_l at the best point, where the terms of size differ by a constant."""
    b = law.exponent
    gap = law.size_scale / law.scale * (SMALL**-law.size_exponent - LARGE**-law.size_exponent)
    kept = RATIO ** (1 / (1 + b))
    tokens = ((kept**-b - 1) / gap) ** (1 / b)
    point = best_growth([pair(law)], RATIO, TOKENS)
    assert point is not None
    assert point.saved == point.low == point.high == pytest.approx(tokens * (kept - RATIO) / TOKENS, rel=1e-5)
    assert point.small_tokens == pytest.approx(tokens, rel=0.01)
    assert point.needed == pytest.approx(RATIO / kept, rel=0.01)


def test_it_is_where_both_lose_as_much_for_a_flop() -> None:
    laws = pair(HOFFMANN)
    point = best_growth([laws], RATIO, TOKENS)
    assert point is not None
    equal = float(laws.equal_tokens(np.array(point.small_tokens)))
    slopes = [
        (law.loss(at * 1.001) - law.loss(at)) / (at * 0.001)
        for law, at in zip((laws.small, laws.large), (point.small_tokens, equal), strict=True)
    ]
    assert slopes[0] / RATIO == pytest.approx(slopes[1], rel=0.02)


@pytest.mark.parametrize("kept", [1.0, 0.95])
def test_no_other_moment_is_better_in_runs_that_are_played_through(kept: float) -> None:
    """Cost to the final loss from scratch and with each of many growth points, from the laws' losses alone."""
    small, large = HOFFMANN.at(SMALL), HOFFMANN.at(LARGE)
    final = float(large.loss(TOKENS))
    best = 0.0
    for tokens in np.geomspace(1e8, 190e9, 400):
        reached = float(small.loss(tokens))
        worth = kept * ((reached - large.floor) / large.scale) ** (-1 / large.exponent)
        rest = ((final - large.floor) / large.scale) ** (-1 / large.exponent) - worth
        if rest >= LEAST_LARGE * TOKENS:
            best = max(best, 1 - (tokens * RATIO + rest) / TOKENS)
    point = best_growth([pair(HOFFMANN)], RATIO, TOKENS, Kept(kept, kept, kept))
    assert point is not None and point.saved == pytest.approx(best, abs=1e-4)


def test_a_growth_that_keeps_too_little_saves_nothing() -> None:
    assert best_growth([pair(HOFFMANN)], RATIO, TOKENS, Kept(0.5, 0.5, 0.5)) is None
    assert best_growth([Pair(LARGE_LAW, LARGE_LAW)], 1.0, TOKENS) is None, "as dear as the large model"


LARGE_LAW = HOFFMANN.at(LARGE)


def test_the_interval_goes_over_laws_and_over_what_is_kept() -> None:
    pairs = [pair(HOFFMANN), pair(BESIROGLU)]
    bound, measured = (best_growth(pairs, RATIO, TOKENS, kept) for kept in (None, Kept(0.97, 0.9, 1.0)))
    assert bound and measured
    assert bound.low < bound.saved < bound.high
    assert measured.low < bound.low and measured.low < measured.saved < measured.high <= bound.high + 1e-9


def test_the_large_stage_has_tokens_left_for_its_decay() -> None:
    """A small model as good as the large one at half the cost would be trained to the end."""
    law = LossLaw(1.5, 300, 0.3)
    point = best_growth([Pair(law, law)], 0.5, TOKENS)
    assert point is not None and point.large_tokens == pytest.approx(LEAST_LARGE * TOKENS, rel=0.01)


def test_a_law_of_all_sizes_is_found_again() -> None:
    true = SizeLaw(1.7, 40.0, 0.21, 130.0, 0.26)
    sizes, tokens = (each.ravel() for each in np.meshgrid([1e6, 3e6, 1e7, 4e7], np.geomspace(2e7, 1e9, 30)))
    losses = true.floor + true.size_scale * sizes**-true.size_exponent + true.scale * tokens**-true.exponent
    found = fit_size_law(sizes, tokens, losses)
    for size, count in ((1e8, 5e9), (2e6, 1e8)):
        assert found.at(size).loss(count) == pytest.approx(true.at(size).loss(count), abs=0.01)
    noisy = fit_size_law(sizes, tokens, losses + np.random.default_rng(0).normal(0, 0.003, len(losses)))
    assert noisy.at(1e8).loss(5e9) == pytest.approx(true.at(1e8).loss(5e9), abs=0.08)
