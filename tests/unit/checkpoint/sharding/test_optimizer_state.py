"""A flat range of a parameter as regions of its logical tensor: each value once, in its place."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.sharding.optimizer_state import StateSlice, placements_by_parameter, state_regions
from flm_megatron.checkpoint.sharding.placement import Placement

LAYERS, ROWS, COLUMNS = 3, 5, 4


def gated(parameter: torch.nn.Parameter, layer: int, rank: int, size: int) -> list[Placement]:
    """Gate and up of tensor-parallel `rank`: two bands of the local matrix, far apart in the logical one."""
    shape = (LAYERS, 2 * ROWS * size, COLUMNS)
    return [
        Placement(
            "w",
            shape,
            Region((layer, (band * size + rank) * ROWS, 0), (1, ROWS, COLUMNS)),
            Region((band * ROWS, 0), (ROWS, COLUMNS)),
            parameter,
            (0, 0, 0),
        )
        for band in (0, 1)
    ]


@settings(deadline=None, max_examples=200)
@given(st.integers(0, LAYERS - 1), st.integers(0, 2), st.lists(st.integers(0, 2 * ROWS * COLUMNS), max_size=4))
def test_ranges_of_a_gated_matrix(layer: int, rank: int, cuts: list[int]) -> None:
    whole = torch.arange(LAYERS * 2 * ROWS * 3 * COLUMNS, dtype=torch.float32).reshape(LAYERS, -1, COLUMNS)
    parts = gated(parameter := torch.nn.Parameter(torch.zeros(2 * ROWS, COLUMNS)), layer, rank, 3)
    with torch.no_grad():
        for part in parts:
            part.tensor.copy_(whole[part.region.slices])
    bounds = [0, *sorted(cuts), parameter.numel()]
    covered, most = torch.zeros_like(whole), 0
    for start, end in itertools.pairwise(bounds):
        flat = parameter.data.flatten()[start:end]
        state = StateSlice(parameter, start, end, True, flat, flat, flat)
        found = list(state_regions(state, placements_by_parameter(parts)))
        most = max(most, len(found))
        for held in found:
            assert torch.equal(held.values(flat), whole[held.region.slices])
            covered[held.region.slices] += 1
    wanted = torch.zeros_like(whole)
    for part in parts:
        wanted[part.region.slices] = 1
    assert torch.equal(covered, wanted) and most <= 6


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 28), st.integers(0, 28))
def test_padding_rows_belong_to_no_region(true_rows: int, start: int, end: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(7, 4))
    parts = [
        Placement("e", (100, 4), Region((50, 0), (true_rows, 4)), Region((0, 0), (true_rows, 4)), parameter, (0, 0, 0))
    ][: min(true_rows, 1)]
    start, end = sorted((start, end))
    flat = torch.arange(28.0)[start:end]
    state = StateSlice(parameter, start, end, True, flat, flat, flat)
    values = [
        v for r in state_regions(state, placements_by_parameter(parts)) for v in r.values(flat).flatten().tolist()
    ]
    assert values == [float(v) for v in range(start, min(end, true_rows * 4))]
