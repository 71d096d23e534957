"""Clipping inside the update, against megatron-core's own step, which clips in a pass before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.config.schema import OptimizerConfig, ParallelConfig, StageConfig
from flm_megatron.distributed.world import layout
from flm_megatron.optim.learning_rate import set_learning_rates
from flm_megatron.training.hooks.layer_norms import layer_norms
from flm_megatron.training.step import TrainState
from tests.support.buffers import stage_of
from tests.support.layouts import SEQUENCE, micro_batches, synthetic_batch
from tests.support.pool import Pool

STEPS = 3


def trained(stage: StageConfig, ours: bool) -> tuple[list[float], dict[str, float], Any]:
    """Norm of the gradients at each step, norms of the layers after the last, and this rank's weights."""
    norms = []
    with layout(stage.parallel, timeout_s=120):
        state = TrainState(stage, SEQUENCE)
        load_state(InitialCheckpoint(stage.model, 7), state.chunks, state.optimizer)
        set_learning_rates(state.optimizer, stage, stage.optimizer.lr)
        for step in range(STEPS):
            batch = micro_batches(synthetic_batch(step, stage.model.vocab_size or 0), stage.micro_batch)
            if ours:
                norms.append(state.train_step(batch).grad_norm)
                continue
            for chunk in state.chunks:
                chunk.zero_grad_buffer()
            engine: Any = state.optimizer
            engine.zero_grad()
            state._losses(batch, forward_only=False)
            norms.append(float(engine.step()[1]))
        weights = torch.cat([x.detach().float().flatten() for chunk in state.chunks for x in chunk.parameters()])
        return norms, layer_norms(state), weights.numpy().copy()


def both(stages: list[StageConfig]) -> list[Any]:
    """Each stage trained by megatron-core's step and by ours, on one rank."""
    return [(trained(stage, ours=False), trained(stage, ours=True)) for stage in stages]


@pytest.mark.parametrize("clip_grad", [0.05, 1e6])
def test_steps_are_those_of_megatron_core(pool: Pool, clip_grad: float) -> None:
    stages = [
        replace(stage_of(parallel, 1, precision=precision), optimizer=OptimizerConfig(lr=1e-3, clip_grad=clip_grad))
        for parallel in (ParallelConfig(data=2), ParallelConfig(tensor=2, distributed_optimizer=False))
        for precision in ("fp32", "bf16")
    ]
    for rank in pool.run(2, both, stages):
        for stage, ((norms, layers, weights), (our_norms, our_layers, our_weights)) in zip(stages, rank, strict=True):
            assert min(norms) > 0.1, "the smaller bound clips every step"
            assert our_norms == pytest.approx(norms, rel=1e-5)
            assert our_layers == pytest.approx(layers, rel=1e-4)
            last_place = 2**-7 if stage.precision == "bf16" else 2**-22
            assert np.allclose(our_weights, weights, rtol=last_place, atol=1e-6)
