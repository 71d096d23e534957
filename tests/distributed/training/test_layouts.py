"""The same run under every layout: losses and gradient norms agree to 1e-5 over ten steps in fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flm_megatron.config.schema import ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Recompute
from flm_megatron.training.hooks.replicas import check_replicas
from tests.support import layouts
from tests.support.layouts import all_layouts, name, relative_difference, take_steps, train_state_under, train_under
from tests.support.pool import Pool

STAGE, DEEP = (
    replace(
        stage,
        model=replace(stage.model, qkv_bias=True, query_key_norm=True),
        optimizer=replace(stage.optimizer, eps_relative=0.1),
    )
    for stage in (layouts.STAGE, layouts.DEEP)
)
SMALL = [layout for world in (2, 4) for layout in all_layouts(world)]
CHUNKS = STAGE.model.num_layers
LARGE = [layout for layout in all_layouts(8) if layout.pipeline * layout.virtual_pipeline <= CHUNKS]
PLAIN = [replace(layout, distributed_optimizer=False) for layout in SMALL if layout.data and layout.data > 1]
SLOW = [layout for layout in SMALL + LARGE if layout.tensor >= 4]
"""Their ranks meet most often, and two processors are not enough for them."""
COVERED = [layout for layout in PLAIN if (layout.data == 4 or layout.tensor == 2) and not layout.sequence]
"""Layouts of two without the distributed optimizer, and one of four with sequence parallelism, are tried every time."""
QUICK = [layout for layout in LARGE[::3] if layout not in SLOW]
TIED = replace(STAGE, model=replace(STAGE.model, num_layers=4, tie_embeddings=True))
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def single(pool: Pool) -> list[tuple[float, float]]:
    """The run on one process."""
    return pool.run(1, train_under, ParallelConfig(), STAGE)[0]


@pytest.fixture(scope="module")
def tied(pool: Pool) -> list[tuple[float, float]]:
    """Five steps of a model whose head is the embedding, on one process."""
    return pool.run(1, train_tied, ParallelConfig())[0]


def check(pool: Pool, parallel: ParallelConfig, single: list[tuple[float, float]], stage: StageConfig = STAGE) -> None:
    """All ranks report the same numbers, and they are those of one process."""
    world = parallel.processes
    ranks = pool.run(world, train_under, parallel, stage)
    assert all(rank == ranks[0] for rank in ranks)
    assert relative_difference(ranks[0], single) <= TOLERANCE


def test_the_run_learns(single: list[tuple[float, float]]) -> None:
    """Ten random batches are not learnt, but the steps are not all alike."""
    assert len({loss for loss, _ in single}) == 10


@pytest.mark.parametrize("parallel", [layout for layout in SMALL + PLAIN if layout not in SLOW + COVERED], ids=name)
def test_layouts_of_two_and_four_agree_with_one(
    pool: Pool, single: list[tuple[float, float]], parallel: ParallelConfig
) -> None:
    check(pool, parallel, single)


@pytest.mark.parametrize("parallel", QUICK, ids=name)
def test_a_quarter_of_the_layouts_of_eight_agree_with_one(
    pool: Pool, single: list[tuple[float, float]], parallel: ParallelConfig
) -> None:
    check(pool, parallel, single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [*COVERED, *(layout for layout in SMALL + LARGE if layout in SLOW or layout not in QUICK + SMALL)],
    ids=name,
)
def test_the_other_layouts_agree_with_one(
    pool: Pool, single: list[tuple[float, float]], parallel: ParallelConfig
) -> None:
    check(pool, parallel, single)


@pytest.mark.slow
def test_one_layer_in_each_of_sixteen_chunks_agrees_with_one_process(pool: Pool) -> None:
    single = pool.run(1, train_under, ParallelConfig(), DEEP)[0]
    check(pool, ParallelConfig(pipeline=8, virtual_pipeline=2), single, DEEP)


def test_an_uneven_explicit_split_agrees_with_one(pool: Pool, single: list[tuple[float, float]]) -> None:
    check(pool, ParallelConfig(pipeline=2, data=1, pipeline_layers=[3, 5]), single)


def test_overlapped_communication_agrees_with_one(pool: Pool, single: list[tuple[float, float]]) -> None:
    parallel = ParallelConfig(data=2, overlap_grad_reduce=True, overlap_param_gather=True)
    check(pool, parallel, single)


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(pipeline=2, data=2, distributed_optimizer=False), marks=pytest.mark.slow),
        ParallelConfig(pipeline=2, virtual_pipeline=2, data=2, overlap_grad_reduce=True),
        ParallelConfig(tensor=2, pipeline=2, data=1, sequence=True),
        pytest.param(ParallelConfig(tensor=2, data=2), marks=pytest.mark.slow),
    ],
    ids=name,
)
def test_a_tied_head_trains_alike_and_its_copies_stay_equal(
    pool: Pool, tied: list[tuple[float, float]], parallel: ParallelConfig
) -> None:
    ranks = pool.run(parallel.processes, train_tied, parallel)
    assert all(rank == ranks[0] for rank in ranks)
    assert relative_difference(ranks[0], tied) <= TOLERANCE


def train_tied(parallel: ParallelConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of five steps; all copies of all weights are compared at the end."""
    with train_state_under(parallel, TIED) as state:
        results = take_steps(state, range(5))
        if parallel.processes > 1:
            check_replicas(state.chunks, 5, 0)
        return results


@pytest.mark.parametrize("recompute", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_recomputation_gives_the_losses_of_none(
    pool: Pool, single: list[tuple[float, float]], recompute: Recompute
) -> None:
    stage = replace(STAGE, recompute=recompute)
    for parallel in (ParallelConfig(), ParallelConfig(tensor=2, pipeline=2, sequence=True, data=1)):
        result = pool.run(parallel.model_size, train_under, parallel, stage)[0]
        assert relative_difference(result, single) <= TOLERANCE


def test_bf16_trains_close_to_fp32(pool: Pool, single: list[tuple[float, float]]) -> None:
    stage = replace(STAGE, precision="bf16")
    parallel = ParallelConfig(tensor=2, data=2)
    result = pool.run(4, train_under, parallel, stage)[0]
    assert 1e-7 < relative_difference(result, single) < 0.05
