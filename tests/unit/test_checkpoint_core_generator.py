"""Random values as functions of seed, name and global index."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint import generator
from flm_megatron.checkpoint.generator import truncated_normal, uniform
from flm_megatron.checkpoint.initial import InitialCheckpoint
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
    whole_uniform = uniform(7, "w", shape, Region.whole(shape))
    before, generator.CHUNK = generator.CHUNK, chunk
    try:
        part, part_uniform = truncated_normal(7, "w", shape, region, 0.02), uniform(7, "w", shape, region)
    finally:
        generator.CHUNK = before
    assert torch.equal(part, whole[region.slices])
    assert torch.equal(part_uniform, whole_uniform[region.slices])


def test_values_are_those_of_splitmix_on_the_global_index() -> None:
    import hashlib

    first, second = (
        int.from_bytes(hashlib.blake2b(b"3:w", digest_size=16).digest()[i : i + 8], "little") for i in (0, 8)
    )

    def value(index: int) -> float:
        z = (index * 0x9E3779B97F4A7C15 + first) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z ^= second
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53 + 2.0**-54

    whole = 160 * 10**9
    got = uniform(3, "w", (whole // 100, 100), Region((whole // 100 - 3, 90), (3, 10)))
    wanted = [[value(whole - 300 + 100 * r + c) for c in range(90, 100)] for r in range(3)]
    assert (got - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 1e-15


def test_uniform_moments_and_range() -> None:
    x = uniform(1, "a", WHOLE, Region.whole(WHOLE))
    assert 0 < x.min() < 1e-5 and 1 - 1e-5 < x.max() < 1
    assert x.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert x.var().item() == pytest.approx(1 / 12, rel=5e-3)
    histogram = torch.histc(x, 100, 0, 1)
    chi_square = ((histogram - 1e4) ** 2 / 1e4).sum().item()
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)


def test_normal_is_the_truncated_normal_distribution() -> None:
    x = truncated_normal(1, "a", WHOLE, Region.whole(WHOLE), std=2.0, mean=1.0, bound=3.0)
    z = ((x - 1) / 2).double()
    assert 2.99 < z.abs().max() <= 3
    inside = math.erf(3 / math.sqrt(2))
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    assert z.mean().item() == pytest.approx(0, abs=4e-3)
    assert z.var().item() == pytest.approx(1 - 6 * density / inside, rel=5e-3)
    # The value of quantile u is the inverse of torch's own distribution function.
    u = uniform(1, "a", WHOLE, Region.whole(WHOLE))
    wanted = torch.special.ndtri(0.5 + (u - 0.5) * inside)
    assert (z - wanted).abs().max() < 1e-6


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
    view = InitialCheckpoint(model, seed=1, optimizer=True, dtype=torch.bfloat16)
    name = "decoder.layers.mlp.linear_fc1.weight"
    weights, masters = view.read(name), view.read(MASTER + name)
    assert weights.shape == (2, 192, 64) and weights.dtype == torch.bfloat16 and masters.dtype == torch.float32
    assert torch.equal(masters.bfloat16(), weights)
    assert masters.std().item() == pytest.approx(0.05 * 0.9866, rel=0.02)
    assert torch.equal(view.read(name, Region((1, 5, 0), (1, 7, 64))), weights[1:2, 5:12])
    assert not view.read(EXP_AVG + name).any()
    assert (view.read("decoder.final_layernorm.weight") == 1).all()
    assert view.has_optimizer() and not InitialCheckpoint(model, 1).has_optimizer()
    with pytest.raises(RequestError, match="nothing"):
        view.read("nothing")


def test_true_shape_of_a_trillion_parameters() -> None:
    model = ModelConfig(140, 20480, 98304, 160, vocab_size=80000)
    view = InitialCheckpoint(model, seed=1)
    shard = view.read("decoder.layers.mlp.linear_fc2.weight", Region((135, 0, 3072 * 31), (1, 200, 3072)))
    part = view.read("decoder.layers.mlp.linear_fc2.weight", Region((135, 100, 98304 - 10), (1, 1, 10)))
    assert torch.equal(shard[:, 100:101, -10:], part)
