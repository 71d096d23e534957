"""Every parallel layout of a number of processes, and a short training under one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.config.schema import (
    DataConfig,
    ModelConfig,
    MupConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
)
from flm_megatron.distributed.world import layout
from flm_megatron.optim.learning_rate import learning_rate, set_learning_rates
from flm_megatron.training.step import Batch, TrainState

SEQUENCE, GLOBAL_BATCH = 16, 8

STAGE = StageConfig(
    model=ModelConfig(
        num_layers=8,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        vocab_size=500,  # padded to 512, to 1,024 under tensor 8
        mup=MupConfig(enabled=True, base_hidden_size=16),
    ),
    global_batch=GLOBAL_BATCH,
    tokens=10 * GLOBAL_BATCH * SEQUENCE,
    optimizer=OptimizerConfig(lr=1e-3, matrix_lr=1e-3, min_lr=1e-4, weight_decay=0.1),
)
DEEP = replace(STAGE, model=replace(STAGE.model, num_layers=16))
"""Has a layer for every model chunk of any layout of eight processes."""


def all_layouts(world: int) -> Iterator[ParallelConfig]:
    """Every (tensor, sequence, pipeline, virtual pipeline, data) of `world` processes."""
    for tensor in divisors(world):
        for pipeline in divisors(world // tensor):
            data = world // tensor // pipeline
            for sequence in (False, True) if tensor > 1 else (False,):
                for virtual in (1, 2) if pipeline > 1 else (1,):
                    yield ParallelConfig(
                        tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, data=data, sequence=sequence
                    )


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def name(parallel: ParallelConfig) -> str:
    """Short name of a layout, for test ids."""
    marks = [f"t{parallel.tensor}", f"p{parallel.pipeline}", f"v{parallel.virtual_pipeline}", f"d{parallel.data}"]
    return (
        "-".join(marks) + ("-seq" if parallel.sequence else "") + ("" if parallel.distributed_optimizer else "-plain")
    )


def synthetic_batch(step: int, vocab: int, sequence: int = SEQUENCE, samples: int = GLOBAL_BATCH) -> Batch:
    """A global batch whose samples have different numbers of unmasked tokens, so that ranks do too."""
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(vocab, (samples, sequence + 1), generator=generator)
    lengths = torch.randint(1, sequence + 1, (samples, 1), generator=generator)
    positions = torch.arange(sequence).expand(samples, sequence)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "position_ids": positions,
        "loss_mask": (positions < lengths).float(),
    }


def micro_batches(batch: Batch, micro: int) -> list[Batch]:
    """This data rank's part of a global batch, in micro-batches."""
    from flm_megatron.engine import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    samples = len(batch["tokens"])
    starts = range(rank * micro, samples, micro * size)
    return [{key: value[start : start + micro] for key, value in batch.items()} for start in starts]


@contextmanager
def train_state_under(parallel: ParallelConfig, stage: StageConfig = STAGE, seed: int = 7) -> Iterator[TrainState]:
    """A model and optimizer with the initial weights of `seed` under a layout."""
    # As few micro-batches as exercise accumulation and the pipeline: each costs collectives in every layer.
    micro = max(1, GLOBAL_BATCH // (parallel.data or 1) // max(2, parallel.pipeline))
    stage = replace(stage, parallel=parallel, micro_batch=micro)
    with layout(parallel, timeout_s=120):
        state = TrainState(stage, SEQUENCE)
        load_state(InitialCheckpoint(stage.model, seed), state.chunks, state.optimizer)
        yield state


def take_steps(state: TrainState, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    stage = state.stage
    run = RunConfig(data=DataConfig(sequence_length=SEQUENCE), stages=[stage])
    results = []
    for step in steps:
        position = (step + 1) * GLOBAL_BATCH * SEQUENCE
        set_learning_rates(state.optimizer, stage, learning_rate(position, run, 0))
        batch = synthetic_batch(step, stage.model.vocab_size or 0)
        result = state.train_step(micro_batches(batch, stage.micro_batch))
        results.append((result.loss, result.grad_norm))
    return results


def train_under(parallel: ParallelConfig, stage: StageConfig = STAGE, steps: int = 10) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step under a layout, from the same initial bits."""
    with train_state_under(parallel, stage) as state:
        return take_steps(state, range(steps))


def relative_difference(left: list[Any], right: list[Any]) -> float:
    """Largest relative difference between two lists of (loss, gradient norm)."""
    a, b = torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    return float(((a - b).abs() / b.abs()).max())
