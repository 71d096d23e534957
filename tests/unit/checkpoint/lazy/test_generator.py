"""Random values as functions of seed, name and global index."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint.lazy import generator
from flm_megatron.checkpoint.lazy.generator import truncated_normal
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import EXP_AVG, MASTER, Region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError

WHOLE = (1000, 1000)


@st.composite
def shapes_and_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    return shape, Region(offsets, sizes)


@settings(deadline=None, max_examples=100)
@given(shapes_and_regions(), st.integers(1, 40))
def test_any_region_is_the_same_slice_of_the_whole(case: tuple[tuple[int, ...], Region], chunk: int) -> None:
    shape, region = case
    whole = truncated_normal(7, "w", shape, Region.whole(shape), 0.02)
    before, generator.CHUNK = generator.CHUNK, chunk
    try:
        part = truncated_normal(7, "w", shape, region, 0.02)
    finally:
        generator.CHUNK = before
    assert torch.equal(part, whole[region.slices])


def uniform(seed: int, name: str, index: np.ndarray) -> np.ndarray:
    """splitmix64 with a second key, written again: values in (0, 1) of the first 40 bits at each index (uint64)."""
    keys = np.frombuffer(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "<u8")
    z = index * np.uint64(0x9E3779B97F4A7C15) + keys[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) ^ keys[1]
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(24)).astype(np.float64) * 2.0**-40


@pytest.mark.parametrize("bound", [0.5, 2.0, 3.0])
def test_values_are_quantiles_of_the_truncated_normal_distribution_at_the_global_index(bound: float) -> None:
    numel = 160 * 10**9
    shape, region = (numel // 100, 100), Region((numel // 100 - 3000, 10), (3000, 80))
    x = truncated_normal(3, "w", shape, region, std=2.0, mean=1.0, bound=bound)
    rows, columns = np.arange(numel - 300_000, numel, 100, dtype=np.uint64), np.arange(10, 90, dtype=np.uint64)
    u = torch.from_numpy(uniform(3, "w", rows[:, None] + columns))
    # The value of quantile u is the inverse of torch's own distribution function.
    wanted = torch.special.ndtri(0.5 + (u - 0.5) * math.erf(bound / math.sqrt(2)))
    assert ((x.double() - 1) / 2 - wanted).abs().max() < 5e-6


def test_every_bit_of_a_value_is_the_generators() -> None:
    """Just above the median a line begins at 0, so the 24 bits that choose a point on it are all seen."""
    numel = 3_000_000
    above = uniform(3, "w", np.arange(numel, dtype=np.uint64)) * 2.0**40 - 2.0**39
    near = (above >= 0) & (above < 2**24)
    assert near.sum() > 20
    x = truncated_normal(3, "w", (numel,), Region.whole((numel,)), std=1.0, bound=3.0).double().numpy()
    slope = math.sqrt(2 * math.pi) * math.erf(3 / math.sqrt(2))  # of the quantile function at the median
    np.testing.assert_allclose(x[near], above[near] * 2.0**-40 * slope, rtol=3e-7)


def test_normal_moments_and_range() -> None:
    x = truncated_normal(1, "a", WHOLE, Region.whole(WHOLE), std=2.0, mean=1.0, bound=3.0)
    z = ((x - 1) / 2).double()
    assert 2.99 < z.abs().max() <= 3
    inside = math.erf(3 / math.sqrt(2))
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    assert z.mean().item() == pytest.approx(0, abs=4e-3)
    assert z.var().item() == pytest.approx(1 - 6 * density / inside, rel=5e-3)
    quantiles = (torch.special.ndtr(z) - 0.5) / inside + 0.5
    histogram = torch.histc(quantiles, 100, 0, 1)
    chi_square = ((histogram - 1e4) ** 2 / 1e4).sum().item()
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)


@pytest.mark.parametrize("other", [(2, "a"), (1, "b")], ids=["seed", "name"])
def test_names_and_seeds_are_independent(other: tuple[int, str]) -> None:
    a = truncated_normal(1, "a", WHOLE, Region.whole(WHOLE), 1.0)
    b = truncated_normal(*other, WHOLE, Region.whole(WHOLE), 1.0)
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()) < 5e-3
    assert (a == b).float().mean() < 1e-4


def test_neighbours_are_independent() -> None:
    a = truncated_normal(1, "a", WHOLE, Region.whole(WHOLE), 1.0).flatten()
    for distance in (1, 2, 1000):
        pair = torch.stack([a[:-distance], a[distance:]])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5e-3


def test_bound_must_be_covered() -> None:
    with pytest.raises(ValueError, match="bound is 7"):
        truncated_normal(1, "a", (2,), Region.whole((2,)), 1.0, bound=7)


def test_lower_precision_is_the_rounded_float32() -> None:
    region = Region((3, 0), (5, 100))
    x = truncated_normal(1, "a", (10, 100), region, 0.1)
    assert torch.equal(truncated_normal(1, "a", (10, 100), region, 0.1, dtype=torch.bfloat16), x.bfloat16())


def test_initial_checkpoint() -> None:
    model = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, vocab_size=300, matrix_init_std=0.05)
    checkpoint = InitialCheckpoint(model, seed=1, optimizer=True, dtype=torch.bfloat16)
    name = "decoder.layers.mlp.linear_fc1.weight"
    weights, masters = checkpoint.read(name), checkpoint.read(MASTER + name)
    assert weights.shape == (2, 192, 64) and weights.dtype == torch.bfloat16 and masters.dtype == torch.float32
    assert torch.equal(masters.bfloat16(), weights)
    assert masters.std().item() == pytest.approx(0.05 * 0.9866, rel=0.02)
    assert torch.equal(checkpoint.read(name, Region((1, 5, 0), (1, 7, 64))), weights[1:2, 5:12])
    assert not checkpoint.read(EXP_AVG + name).any()
    assert (checkpoint.read("decoder.final_layernorm.weight") == 1).all()
    head, of_its_own = "output_layer.weight", InitialCheckpoint(replace(model, head_init_std=0.005), seed=1)
    assert checkpoint.read(MASTER + head).std().item() == pytest.approx(0.02 * 0.9866, rel=0.02)
    assert of_its_own.read(head).std().item() == pytest.approx(0.005 * 0.9866, rel=0.02)
    assert checkpoint.has_optimizer() and not InitialCheckpoint(model, 1).has_optimizer()
    with pytest.raises(RequestError, match="nothing"):
        checkpoint.read("nothing")


def test_true_shape_of_a_trillion_parameters() -> None:
    model = ModelConfig(140, 20480, 98304, 160, vocab_size=80000)
    checkpoint = InitialCheckpoint(model, seed=1)
    shard = checkpoint.read("decoder.layers.mlp.linear_fc2.weight", Region((135, 0, 3072 * 31), (1, 200, 3072)))
    part = checkpoint.read("decoder.layers.mlp.linear_fc2.weight", Region((135, 100, 98304 - 10), (1, 1, 10)))
    assert torch.equal(shard[:, 100:101, -10:], part)
