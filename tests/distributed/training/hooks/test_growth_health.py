"""What is measured of a grown stage is that of the whole matrices, and the same under every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.distributed.world import layout
from flm_megatron.growth.distance import layer_distances
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.model.parameters import EMBEDDING, FC1, FC2
from flm_megatron.training.hooks.growth_health import Health, HealthParts, MeasuredStep, effective_rank
from flm_megatron.training.step import TrainState
from tests.support.growth_cases import MemoryCheckpoint, growth
from tests.support.layouts import STAGE, synthetic_batch, take_steps, train_state_under
from tests.support.pool import Pool

NEW = replace(STAGE.model, num_layers=4, ffn_hidden_size=32, head_dim=4)  # no side of a matrix is projected
GROWN_STAGE = replace(STAGE, model=NEW, optimizer=replace(STAGE.optimizer, lr=1e-2, matrix_lr=1e-2))
SMALLER: dict[str, Any] = {"hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 6, "num_layers": 3}
Weights = dict[str, torch.Tensor]
Alone = tuple[list[Health], Weights, Weights, list[tuple[float, float]]]


def plan(**old: Any) -> GrowthPlan:
    """The plan of a growth into NEW from a model with these sizes."""
    return make_plan(replace(NEW, **old), NEW, growth("zero"), seed=5)


PLANS = [plan(**SMALLER), plan(ffn_hidden_size=20), plan(num_attention_heads=6), plan(num_layers=3)]


def weights_of(state: TrainState) -> Weights:
    """Every logical tensor of a state that one process holds whole."""
    from flm_megatron.checkpoint.sharding.placement import placements

    found: Weights = {}
    for each in placements(state.chunks):
        found.setdefault(each.name, torch.zeros(each.shape))[each.region.slices] = each.tensor.float()
    return found


def measured(parallel: ParallelConfig, plans: list[GrowthPlan]) -> tuple[list[Health], Weights, Weights]:
    """What is measured of the second step under a layout; weights before and after where one process has them all."""
    with train_state_under(parallel, GROWN_STAGE) as state:
        take_steps(state, range(1))
        alone = torch.distributed.get_world_size() == 1
        before = weights_of(state) if alone else {}
        steps = [MeasuredStep(state, HealthParts(each)) for each in plans]
        take_steps(state, range(1, 2))
        return [step.finish(applied=True) for step in steps], before, weights_of(state) if alone else {}


def plain_rank(block: torch.Tensor) -> float:
    """Effective rank as Roy and Vetterli define it."""
    values = torch.linalg.svdvals(block.double())
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def measured_beside_the_command() -> Alone:
    """`measured` on one process, and what `flm distance` measures of the weights before on the step's tokens."""
    found = measured(ParallelConfig(), PLANS)
    tokens = synthetic_batch(1, NEW.vocab_size or 0)["tokens"]
    under = partial(layout, timeout_s=120)
    distances = layer_distances(MemoryCheckpoint(found[1]), NEW, GROWN_STAGE, tokens, under)
    return *found, [(each.cosine, each.l2) for each in distances]


@pytest.fixture(scope="module")
def alone(pool: Pool) -> Alone:
    """Growths of all dimensions at once, and of one each, measured on one process."""
    found: Alone = pool.run(1, measured_beside_the_command)[0]
    return found


def test_the_numbers_are_those_of_the_whole_matrices(alone: Alone) -> None:
    (health, *_), before, after, _ = alone
    copied = [layer.copy for layer in PLANS[0].layer_sources]
    assert sum(copied) == 1
    rows = torch.zeros(NEW.vocab_size or 0, 32, dtype=torch.bool)
    rows[:, :24] = True
    for added, side in ((~rows, "new"), (rows, "old")):
        values, change = after[EMBEDDING][added].double(), (after[EMBEDDING] - before[EMBEDDING])[added].double()
        assert health[EMBEDDING][f"weight_norm_{side}"] == pytest.approx(values.norm().item(), rel=1e-6)
        assert health[EMBEDDING][f"weight_rms_{side}"] == pytest.approx(values.square().mean().sqrt().item(), rel=1e-6)
        assert health[EMBEDDING][f"update_{side}"] == pytest.approx((change.norm() / values.norm()).item(), rel=1e-6)
    for layer, copy in enumerate(copied):
        fc1, fc2 = after[f"{FC1}.weight"][layer], after[f"{FC2}.weight"][layer]
        numbers, first = health[f"layer_{layer:03d}"], 0 if copy else 24
        assert numbers["rank_fc1_new"] == pytest.approx(plain_rank(fc1[:, first:]), rel=1e-5)
        assert numbers["rank_fc2_new"] == pytest.approx(plain_rank(fc2[first:]), rel=1e-5)
        assert ("rank_fc2_old" in numbers) == ("weight_norm_old" in numbers) == (not copy)
    whole = sum(value**2 for part in health.values() for key, value in part.items() if key.startswith("weight_norm"))
    matrices = [
        tensor for name, tensor in after.items() if tensor.dim() > 2 or name in (EMBEDDING, "output_layer.weight")
    ]
    assert whole == pytest.approx(sum(tensor.double().square().sum().item() for tensor in matrices), rel=1e-6)


def test_distances_are_those_of_the_command(alone: Alone) -> None:
    (health, *_), *_, found = alone
    for layer, expected in enumerate(found):
        numbers = health[f"layer_{layer:03d}"]
        assert (numbers["distance_cosine"], numbers["distance_l2"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2, pipeline=2, data=1, sequence=True),
        pytest.param(ParallelConfig(tensor=2, pipeline=2, data=2), marks=pytest.mark.slow),
        pytest.param(ParallelConfig(pipeline=2, data=2, distributed_optimizer=False), marks=pytest.mark.slow),
    ],
)
def test_the_numbers_do_not_depend_on_the_layout(parallel: ParallelConfig, alone: Alone, pool: Pool) -> None:
    world = parallel.tensor * parallel.pipeline * (parallel.data or 1)
    for found, *_ in pool.run(world, measured, parallel, PLANS):
        for health, expected in zip(found, alone[0], strict=True):
            assert list(health) == list(expected)
            for name, numbers in expected.items():
                assert health[name] == pytest.approx(numbers, rel=1e-5), name


def test_ranks_are_those_of_the_channels_that_grow(alone: Alone) -> None:
    (_, ffn, heads, layers), _, after, _ = alone
    ranks = [{key for key in health["layer_000"] if key.startswith("rank")} for health in (ffn, heads, layers)]
    assert ranks == [
        {"rank_fc1_old", "rank_fc1_new", "rank_fc2_old", "rank_fc2_new"},
        {"rank_qkv_old", "rank_qkv_new", "rank_projection_old", "rank_projection_new"},
        {"rank_fc1_old", "rank_fc2_old"},
    ]
    expected = plain_rank(after[f"{FC2}.weight"][0][:, 20:])
    assert ffn["layer_000"]["rank_fc2_new"] == pytest.approx(expected, rel=1e-5)


def test_dead_and_flat_channels_are_seen_in_the_rank() -> None:
    draw = torch.Generator().manual_seed(1)
    flat = torch.randn(64, 1, generator=draw) @ torch.randn(1, 64, generator=draw)
    ranks = effective_rank(torch.stack([torch.zeros(64, 64), flat, torch.eye(64)]).double())
    assert ranks.tolist() == pytest.approx([0, 1, 64], rel=1e-5)


def test_a_model_without_layers_has_its_embedding_and_head_measured() -> None:
    bare = replace(NEW, num_layers=0)
    narrow = replace(bare, hidden_size=24, num_attention_heads=6)
    parts = HealthParts(make_plan(narrow, bare, growth("mask"), seed=5))
    assert parts.names == [EMBEDDING, "output_layer.weight"] and not parts.channels


def test_a_projected_matrix_is_the_sum_of_its_regions_and_keeps_a_low_rank() -> None:
    model = replace(NEW, hidden_size=200, num_attention_heads=50, ffn_hidden_size=150)
    parts = HealthParts(
        make_plan(replace(model, hidden_size=80, num_attention_heads=20), model, growth("zero"), seed=5)
    )
    channels = parts.channels[f"{FC2}.weight"]
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(200, 3, generator=draw) @ torch.randn(3, 150, generator=draw)
    whole = channels.sketch(matrix, slice(0, 200), slice(0, 150), new_layer=False)
    assert whole.shape == (2, 64, 64)
    cuts = [(slice(a, a + 50), slice(b, b + 75)) for a in range(0, 200, 50) for b in (0, 75)]
    pieces = [channels.sketch(matrix[cut], *cut, new_layer=False) for cut in cuts]
    torch.testing.assert_close(torch.stack(pieces).sum(0), whole, rtol=1e-4, atol=1e-2)
    assert all(2 < rank < 3.001 for rank in effective_rank(whole).tolist())
    new_layer = channels.sketch(matrix, slice(0, 200), slice(0, 150), new_layer=True)
    expected = torch.stack([torch.zeros(64, 64, dtype=torch.float64), whole.sum(0)])
    torch.testing.assert_close(new_layer, expected, rtol=1e-4, atol=1e-2)
