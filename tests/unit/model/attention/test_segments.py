"""Attention within packed segments, beside torch's attention under a dense mask in float64, gradients included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flm_megatron.config.schema import ModelConfig
from flm_megatron.device import use
from flm_megatron.device.rehearsed import RehearsedDevice
from flm_megatron.model.attention import segments as module
from flm_megatron.model.attention.segments import attend_within, segment_ends

SEQUENCE, CHANNELS = 24, 8
PACKED = torch.tensor([[1] * 5 + [2] + [3] * 15 + [0] * 3, [1] * 20 + [2] * 4])
MODEL = ModelConfig(hidden_size=256, num_attention_heads=4, num_query_groups=2)
CASES = [(1, 1), (3, 1), (2, 4)]
"""Query groups, and heads of each."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, int | None], Tensor]


def inputs(groups: int, heads: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as the rotary kernel gives them: parts of one packed projection, groups in the batch."""
    chance = torch.Generator().manual_seed(groups * heads)
    packed = torch.randn(SEQUENCE, len(PACKED), groups, heads + 2, CHANNELS, generator=chance).to(dtype)
    packed = packed.flatten(1, 2)
    query, key, value = (part.detach().requires_grad_() for part in packed.split([heads, 1, 1], dim=2))
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Scores of all pairs of positions in float64, those that are hidden at minus infinity."""
    groups = query.size(1) // len(PACKED)
    seen = (PACKED[:, :, None] == PACKED[:, None, :]).tril()
    seen = (seen if window is None else seen.triu(1 - window)).repeat_interleave(groups, 0).unsqueeze(1)
    query, key, value = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (CHANNELS**-0.5 if scale is None else scale)
    output = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    return output.permute(2, 0, 1, 3).flatten(2)


def with_gradients(
    attend: Attend, groups: int, heads: int, scale: float | None, dtype: torch.dtype, window: int | None = None
) -> list[Tensor]:
    """Output and gradients in float64."""
    leaves = inputs(groups, heads, dtype)
    output = attend(*leaves, segment_ends(PACKED), scale, window)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [x.double() for x in (output, *torch.autograd.grad(output, leaves, upstream))]


def flat_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's documentation says of its variable-length attention, on a CPU; as strict about heads."""
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype is torch.int32 and window_size[1] == 0
    assert enable_gqa == (query.size(1) != key.size(1))
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(query) and max_q == max_k >= max(map(int.__sub__, bounds[1:], bounds))
    pieces = []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window_size[0] >= 0:  # how many positions before its own a query sees
            seen = seen.triu(-window_size[0])
        attended = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        pieces.append(attended[0].transpose(0, 1))
    return torch.cat(pieces)


def without_empty_ones(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *given: Any, **named: Any) -> Tensor:
    """A call that refuses empty sequences, which a sample has that is packed with fewer than another."""
    if bounds.diff().min() == 0:
        raise RuntimeError("empty sequence")
    return flat_varlen(query, key, value, bounds, *given, **named)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """torch's module of variable-length attention, able to run on a CPU."""
    module.obstacle.cache_clear()
    stand_in = ModuleType("torch.nn.attention.varlen")
    stand_in.varlen_attn = flat_varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    yield stand_in
    module.obstacle.cache_clear()


def test_ends_are_counted_over_all_samples() -> None:
    assert segment_ends(PACKED).tolist() == [[5, 6, 21, 24], [44, 48, 48, 48]]
    assert segment_ends(torch.zeros(2, 7, dtype=torch.long)).tolist() == [[7], [14]]
    assert segment_ends(PACKED).dtype is torch.int32


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("groups", "heads"), CASES)
def test_attention_is_that_of_a_dense_mask(
    groups: int, heads: int, scale: float | None, dtype: torch.dtype, tolerance: float, varlen: ModuleType
) -> None:
    expected = with_gradients(dense, groups, heads, scale, dtype)
    for attend in (attend_within, module._in_one_call):
        for one, other in zip(with_gradients(attend, groups, heads, scale, dtype), expected, strict=True):
            assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("window", [2, 4, 11])
def test_a_window_hides_more_of_each_segment(window: int, varlen: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flm_megatron.model.attention.window.SMALLEST_BLOCK", 3)
    expected = with_gradients(dense, 2, 4, None, torch.float64, window)
    for attend in (attend_within, module._in_one_call):
        for one, other in zip(with_gradients(attend, 2, 4, None, torch.float64, window), expected, strict=True):
            assert (one - other).abs().max() <= 1e-14 * other.abs().max()


@pytest.mark.parametrize(("groups", "heads"), CASES)
def test_torch_s_own_call_takes_what_it_is_given(groups: int, heads: int) -> None:
    """By shapes alone: its kernels are a GPU's."""
    pytest.importorskip("torch.nn.attention.varlen")
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [x.shape for x in inputs(groups, heads)]
        query, key, value = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        output = module._in_one_call(query, key, value, torch.empty(2, 4, dtype=torch.int32), None)
        assert output.shape == (SEQUENCE, 2 * groups, heads * CHANNELS) and output.is_contiguous()
        gradients = torch.autograd.grad(output.sum(), (query, key, value))
        assert [gradient.shape for gradient in gradients] == shapes


@pytest.mark.parametrize(("grouped", "windowed"), [(False, False), (True, True)])
def test_torch_is_tried_once(grouped: bool, windowed: bool, varlen: ModuleType) -> None:
    host = torch.device("cpu")
    assert module.obstacle(host, torch.bfloat16, 64, grouped, windowed) is None
    module.obstacle.cache_clear()
    varlen.varlen_attn = lambda *given, **named: flat_varlen(*given, **named) * 1.5  # type: ignore[attr-defined]
    assert "away" in str(module.obstacle(host, torch.float32, 64, grouped, windowed))
    module.obstacle.cache_clear()
    varlen.varlen_attn = without_empty_ones  # type: ignore[attr-defined]
    assert module.obstacle(host, torch.float32, 64, grouped, windowed) == "RuntimeError: empty sequence"
    module.obstacle.cache_clear()
    varlen.varlen_attn = lambda *given, is_causal=False: None  # type: ignore[attr-defined]
    assert "TypeError" in str(module.obstacle(host, torch.float32, 64, grouped, windowed))
    module.obstacle.cache_clear()
    del varlen.varlen_attn
    assert "ImportError" in str(module.obstacle(host, torch.float32, 64, grouped, windowed))


@pytest.mark.parametrize("reason", [None, "ImportError: no"])
def test_the_log_says_so_in_one_line(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.packing_notice(MODEL, torch.bfloat16) is None
    asked: list[tuple[object, ...]] = []

    def answer(*about: object) -> str | None:
        asked.append(about)
        return reason

    monkeypatch.setattr(module, "current", lambda: SimpleNamespace(torch_device=torch.device("meta")))
    monkeypatch.setattr(module, "obstacle", answer)
    notice = module.packing_notice(MODEL, torch.bfloat16)
    assert notice is None if reason is None else reason in str(notice) and "64 channels of bfloat16" in str(notice)
    assert asked == [(torch.device("meta"), torch.bfloat16, 64, True, False)]


def test_scores_between_segments_are_not_computed() -> None:
    query, key, value = inputs(2, 4)
    halves = segment_ends(torch.arange(SEQUENCE).div(SEQUENCE // 2, rounding_mode="floor").expand(2, -1))
    counts = []
    for ends in (segment_ends(torch.zeros_like(PACKED)), halves):
        with FlopCounterMode(display=False) as counter:
            attend_within(query, key, value, ends, None)
        counts.append(counter.get_total_flops())
    assert counts[0] == 2 * counts[1]


def test_a_device_without_values_takes_one_segment() -> None:
    before = use(RehearsedDevice())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert segment_ends(torch.zeros(3, 16, dtype=torch.long)).shape == (3, 1)
    finally:
        use(before)
