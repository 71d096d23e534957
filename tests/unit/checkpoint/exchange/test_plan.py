"""The plan of an exchange: every wanted value comes once, from someone who holds it, and rounds are bounded."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flm_megatron.checkpoint.exchange.description import Description, Held, NamedRegion, described
from flm_megatron.checkpoint.exchange.plan import Part, Plan, make_plan
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.errors import RequestError

WHOLE = {
    "matrix": torch.arange(7 * 9, dtype=torch.float32).view(7, 9),
    "layers": torch.arange(30.0).view(2, 3, 5).half(),
}


def held(*regions: NamedRegion) -> list[Held]:
    """Copies of regions of the tensors above."""
    return [(name, region, WHOLE[name][region.slices].clone()) for name, region in regions]


def plans(
    holding: Sequence[Sequence[Held]], wanted: Sequence[Sequence[Sequence[NamedRegion]]], limit: int
) -> list[Plan]:
    """Everyone's plan, from descriptions that went through the wire's form."""
    told = [described(*both).packed() for both in zip(holding, wanted, strict=True)]
    everyone = [Description.unpacked(data) for data in told]
    return [make_plan(everyone, rank, limit) for rank in range(len(everyone))]


@st.composite
def named_regions(draw: st.DrawFn) -> NamedRegion:
    name = draw(st.sampled_from(sorted(WHOLE)))
    offsets = [draw(st.integers(0, n - 1)) for n in WHOLE[name].shape]
    sizes = [draw(st.integers(1, n - o)) for n, o in zip(WHOLE[name].shape, offsets, strict=True)]
    return name, Region(tuple(offsets), tuple(sizes))


@given(st.data())
def test_every_wanted_value_comes_once_and_rounds_are_bounded(data: st.DataObject) -> None:
    """Whoever holds what: cut anyhow, several times, overlapping."""
    size, limit = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([16, 64, 1000]))
    holding: list[list[Held]] = [[] for _ in range(size)]
    for name, values in WHOLE.items():
        for region in split_region(Region.whole(tuple(values.shape)), data.draw(st.integers(1, 40))):
            for rank in data.draw(st.sets(st.integers(0, size - 1), min_size=1)):
                holding[rank] += held((name, region))
    for rank in range(size):
        holding[rank] += held(*data.draw(st.lists(named_regions(), max_size=2)))
    wanted = [data.draw(st.lists(st.lists(named_regions(), max_size=3), max_size=4)) for _ in range(size)]
    everyone = plans(holding, wanted, limit)

    assert len({len(plan.rounds) for plan in everyone}) == 1 and all(p.traffic == everyone[0].traffic for p in everyone)
    flat = [[each for group in groups for each in group] for groups in wanted]
    counts = [[torch.zeros(region.sizes) for _, region in regions] for regions in flat]
    sent, received = [0] * size, [0] * size
    for rounds in zip(*(plan.rounds for plan in everyone), strict=True):
        for rank, mine in enumerate(rounds):
            for here, there in mine.local:
                check_part(holding[rank], here, flat[rank], there, counts[rank])
            for peer, parts in mine.receives.items():
                assert peer != rank
                for here, there in zip(rounds[peer].sends[rank], parts, strict=True):
                    check_part(holding[peer], here, flat[rank], there, counts[rank])
            nbytes = {peer: bytes_of(flat[rank], parts) for peer, parts in mine.receives.items()}
            received[rank] += sum(nbytes.values())
            out = {peer: bytes_of(flat[peer], rounds[peer].receives[rank]) for peer in mine.sends}
            sent[rank] += sum(out.values())
            assert sum(nbytes.values()) <= limit or len(mine.groups) == 1 or largest(wanted[rank]) > limit
            assert sum(out.values()) <= limit or largest([g for groups in wanted for g in groups]) > limit
    assert all((count == 1).all() for each in counts for count in each)
    for rank, plan in enumerate(everyone):
        assert [number for each in plan.rounds for number in each.groups] == list(range(len(wanted[rank])))
    assert (everyone[0].traffic.sent, everyone[0].traffic.received) == (sent, received)


def check_part(
    holding: Sequence[Held], here: Part, wanted: Sequence[NamedRegion], there: Part, counts: Sequence[torch.Tensor]
) -> None:
    """A part is of one tensor on both sides, inside what is held and what is wanted."""
    name, region, _ = holding[here.index]
    assert name == wanted[there.index][0] and here.region == there.region
    assert here.region.intersect(region) == here.region
    counts[there.index][there.region.within(wanted[there.index][1]).slices] += 1


def bytes_of(wanted: Sequence[NamedRegion], parts: Sequence[Part]) -> int:
    """Bytes of the values of parts."""
    return sum(part.region.numel * WHOLE[wanted[part.index][0]].element_size() for part in parts)


def largest(groups: Sequence[Sequence[NamedRegion]]) -> int:
    """Bytes of the largest group."""
    return max((sum(r.numel * WHOLE[name].element_size() for name, r in group) for group in groups), default=0)


def test_replicas_share_the_sending_and_nobody_sends_to_itself() -> None:
    matrix = ("matrix", Region.whole((7, 9)))
    row = [[("matrix", Region((n, 0), (1, 9)))] for n in range(7)]
    (plan, *_) = plans([held(matrix), held(matrix), [], []], [row, [], row, row], 10**6)
    assert plan.traffic.sent == [7 * 36, 7 * 36, 0, 0] and plan.traffic.received == [0, 0, 7 * 36, 7 * 36]
    assert len(plan.rounds[0].local) == 7 and plan.traffic.rounds == 1


def test_what_nobody_holds_and_two_dtypes_of_one_tensor_are_refused() -> None:
    top, bottom = ("matrix", Region((0, 0), (6, 9))), ("matrix", Region((6, 0), (1, 9)))
    with pytest.raises(RequestError, match=r"matrix: rank 1 wants .*which no rank holds"):
        plans([held(top), []], [[], [[bottom]]], 10**6)
    with pytest.raises(RequestError, match=r"float32 by one rank and in torch\.float64 by another"):
        other = [(name, region, values.double()) for name, region, values in held(bottom)]
        plans([held(top), other], [[], []], 10**6)
