"""Attention to the last positions alone, beside a dense mask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flm_megatron.model.attention import core
from flm_megatron.model.attention import window as module
from flm_megatron.model.attention.cache import KeyValueCache
from flm_megatron.model.attention.segments import whole_sequences
from flm_megatron.model.attention.window import attend_in_window

KEYS, GROUPS, HEADS, CHANNELS = 29, 2, 3, 8


def inputs(queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the last `queries` of all positions, in float64."""
    chance = torch.Generator().manual_seed(queries)
    shapes = [(queries, 2, GROUPS * HEADS, CHANNELS), *[(KEYS, 2, GROUPS, CHANNELS)] * 2]
    query, key, value = (torch.randn(shape, generator=chance, dtype=torch.float64) for shape in shapes)
    return query, key, value


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of queries that a short sequence has several of."""
    monkeypatch.setattr(module, "SMALLEST_BLOCK", 4)


@pytest.mark.parametrize("window", [1, 3, 9, 28])
@pytest.mark.parametrize("queries", [KEYS, 10, 1])
def test_position_i_sees_the_window_that_ends_with_it(queries: int, window: int) -> None:
    query, key, value = inputs(queries)
    hidden = torch.rand(1, 1, queries, KEYS, generator=torch.Generator().manual_seed(3)) < 0.3
    hidden[..., torch.arange(queries), torch.arange(KEYS - queries, KEYS)] = False
    place = torch.arange(KEYS)
    for mask in (None, hidden):
        seen = (place <= place[:, None]) & (place > place[:, None] - window)
        seen = seen[KEYS - queries :] if mask is None else seen[KEYS - queries :] & ~mask
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        expected = F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True).permute(2, 0, 1, 3)
        assert torch.allclose(attend_in_window(query, key, value, 0.3, window, mask), expected, rtol=0, atol=1e-14)


def test_scores_far_outside_the_window_are_not_computed() -> None:
    query, key, value = inputs(KEYS)
    with FlopCounterMode(display=False) as counter:
        attend_in_window(query, key, value, None, 4)
    every_key = 2 * 2 * 2 * GROUPS * HEADS * KEYS * KEYS * CHANNELS
    assert counter.get_total_flops() < every_key / 4


def test_on_a_gpu_the_one_call_for_whole_sequences_is_not_for_queries_behind_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By shapes alone, on a device that is no CPU: that call takes as many keys as queries."""
    lengths: list[int] = []

    def one_call(query: Tensor, *others: object) -> Tensor:
        """Note the queries."""
        lengths.append(query.size(0))
        return query.flatten(2)

    monkeypatch.setattr(core, "attend_within", one_call)
    attention = core.CoreAttention(SimpleNamespace(xpos_scale_base=None, sliding_window=4), 1, None, "self")  # type: ignore[arg-type]
    attention.cache = KeyValueCache(KEYS)
    for new in (8, 1, 3):
        attention.cache.begin(new)
        query, key, value = (
            torch.empty(new, 2, heads, CHANNELS, device="meta") for heads in (GROUPS * HEADS, GROUPS, GROUPS)
        )
        output = attention(query, key, value, whole_sequences(2, new, query.device))
        assert output.shape == (new, 2, GROUPS * HEADS * CHANNELS)
    assert lengths == [8]
