"""Replicas read what they hold alike once among them, and fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.checkpoint.sharding.placement import placements
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.errors import DamagedError
from tests.support.layouts import train_state_under
from tests.support.pool import Pool

MODEL = ModelConfig(num_layers=2, hidden_size=48, ffn_hidden_size=70, num_attention_heads=6, vocab_size=301)
STAGE = StageConfig(model=MODEL, global_batch=8, micro_batch=1)


class Counting(LogicalCheckpoint):
    """Fresh weights with masters and moments, which remembers what was read of it; one read of a rank may fail."""

    def __init__(self, damaged: str = "") -> None:
        self.source = InitialCheckpoint(MODEL, 3, optimizer=True)
        self.manifest, self.tensors = self.source.manifest, self.source.tensors
        self.damaged, self.values = damaged, dict.fromkeys(self.tensors, 0)

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of a region, counted."""
        if name == self.damaged:
            raise DamagedError(f"{name}: changed", Path("somewhere"))
        values = self.source.read(name, region)
        self.values[name] += values.numel()
        return values


def reads(parallel: ParallelConfig, alone: bool) -> Any:
    """What this rank reads to load the model, and how far its weights are from what they have to be."""
    checkpoint = Counting()
    with train_state_under(parallel, STAGE, seed=99) as state:
        load_state(checkpoint, state.chunks, state.optimizer, alone)
        wrong = sum(
            not torch.equal(p.tensor, checkpoint.source.read("optimizer.state.param." + p.name, p.region))
            for p in placements(state.chunks)
        )
    return checkpoint.values, wrong


def failure(parallel: ParallelConfig) -> str:
    """What loading a damaged checkpoint raises on this rank."""
    with train_state_under(parallel, STAGE) as state:
        try:
            load_state(Counting("optimizer.state.param.output_layer.weight"), state.chunks, state.optimizer)
        except DamagedError as error:
            return f"{error} in {error.checkpoint}"
    return "nothing"


def test_each_weight_is_read_by_one_replica(pool: Pool) -> None:
    results = pool.run(4, reads, ParallelConfig(tensor=2, data=2), False)
    assert [wrong for _, wrong in results] == [0] * 4
    split = "optimizer.state.param.decoder.layers.mlp.linear_fc2.weight"
    total = sum(values[split] for values, _ in results)
    assert total == 2 * 48 * 70  # once, over two tensor-parallel ranks of two replicas
    assert all(sum(values.values()) < sum(results[0][0].values()) * 1.5 for values, _ in results)
    # Moments are each rank's own part under the distributed optimizer.
    assert sum(values["optimizer.state.exp_avg.output_layer.weight"] for values, _ in results) == 301 * 48


def test_a_replica_that_loads_alone_reads_everything(pool: Pool) -> None:
    results = pool.run(2, reads, ParallelConfig(data=2), True)
    assert [wrong for _, wrong in results] == [0, 0]
    assert [values["optimizer.state.param.output_layer.weight"] for values, _ in results] == [301 * 48] * 2


def test_replicas_fail_together(pool: Pool) -> None:
    told = pool.run(2, failure, ParallelConfig(data=2))
    assert told == ["optimizer.state.param.output_layer.weight: changed in somewhere"] * 2
