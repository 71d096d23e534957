"""Twenty pairs of layouts: saved under one, re-sharded for another, trained on there as where it was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import load_state, save_state
from flm_megatron.checkpoint.tools.reshard import reshard
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.distributed.launched import launched_processes
from tests.support.layouts import STAGE, name, relative_difference, take_steps, train_state_under
from tests.support.pool import Pool

# 301 is padded to 384 without tensor parallelism and to 512 under tensor 2.
MODEL = ModelConfig(
    num_layers=4, hidden_size=48, ffn_hidden_size=70, num_attention_heads=6, num_query_groups=2, vocab_size=301
)
STAGE_HERE = replace(STAGE, model=MODEL)
SOURCES = [
    ParallelConfig(data=1),
    ParallelConfig(tensor=2, sequence=True, data=1),
    ParallelConfig(pipeline=2, virtual_pipeline=2, data=1),
    ParallelConfig(data=2, distributed_optimizer=False),
    ParallelConfig(tensor=2, pipeline=2, data=1),
]
TARGETS = [
    ParallelConfig(data=2),
    ParallelConfig(tensor=2, data=1),
    ParallelConfig(pipeline=4, data=1),
    ParallelConfig(tensor=2, sequence=True, pipeline=2, data=2),
]
STEPS = range(2, 5)


def save_and_go_on(path: str, parallel: ParallelConfig) -> list[tuple[float, float]]:
    """Two steps, a checkpoint, and three more steps' loss and gradient norm."""
    with train_state_under(parallel, STAGE_HERE) as state:
        take_steps(state, range(2))
        save_state(path, state.chunks, state.optimizer, Manifest(position=StagePosition(2, optimizer_step=2))).wait()
        return take_steps(state, STEPS)


def reshard_and_go_on(folder: str, parallel: ParallelConfig) -> list[tuple[str, Any]]:
    """Logical hash and three steps of every source, its files re-sharded for this layout by its own processes."""
    results = []
    with train_state_under(parallel, STAGE_HERE, seed=99) as state:
        for source in SOURCES:
            checkpoint, target = (
                open_checkpoint(Path(folder) / name(source)),
                Path(folder) / f"{name(source)}-{name(parallel)}",
            )
            with launched_processes() as processes:
                reshard(checkpoint, target, processes, checkpoint.manifest, (MODEL, parallel))
            load_state(open_checkpoint(target), state.chunks, state.optimizer)
            steps = take_steps(state, STEPS)
            load_state(open_checkpoint(target), state.chunks, state.optimizer)
            again = Path(folder) / f"{target.name}-again"
            save_state(
                again, state.chunks, state.optimizer, Manifest(position=StagePosition(2, optimizer_step=2))
            ).wait()
            results.append((open_checkpoint(again).manifest.logical_hash, steps))
    return results


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of every source layout, and how training went on there."""
    folder = tmp_path_factory.mktemp("sources")
    return folder, {
        name(source): pool.run(source.processes, save_and_go_on, str(folder / name(source)), source)[0]
        for source in SOURCES
    }


@pytest.mark.parametrize("target", [*TARGETS[:3], pytest.param(TARGETS[3], marks=pytest.mark.slow)], ids=name)
def test_training_goes_on_as_where_it_was_saved(
    pool: Pool, saved: tuple[Path, dict[str, Any]], target: ParallelConfig
) -> None:
    folder, expected = saved
    results = pool.run(target.processes, reshard_and_go_on, str(folder), target)[0]
    for source, (again, steps) in zip(SOURCES, results, strict=True):
        assert again == open_checkpoint(folder / name(source)).manifest.logical_hash, name(source)
        assert relative_difference(steps, expected[name(source)]) < 1e-5, name(source)
