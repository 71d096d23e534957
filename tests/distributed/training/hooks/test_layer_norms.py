"""Norms per layer are the same under every layout, and are those of the weights and of the whole gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.config.schema import ParallelConfig
from flm_megatron.config.schema.stage import Precision
from flm_megatron.model.parameters import EMBEDDING
from flm_megatron.training.hooks.layer_norms import layer_norms
from tests.support.layouts import STAGE, take_steps, train_state_under
from tests.support.pool import Pool

FROZEN = replace(STAGE, optimizer=replace(STAGE.optimizer, lr=1e-30, matrix_lr=1e-30, min_lr=0, weight_decay=0))


def norms_after_a_step(parallel: ParallelConfig, precision: Precision = "fp32") -> tuple[dict[str, float], float]:
    """Norms and the whole gradient's norm after a step that moves nothing."""
    with train_state_under(parallel, replace(FROZEN, precision=precision)) as state:
        ((_, grad_norm),) = take_steps(state, range(1))
        return layer_norms(state), grad_norm


@pytest.mark.parametrize(
    ("distributed_optimizer", "precision"),
    [
        (True, "fp32"),
        (False, "bf16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, "bf16"), (False, "fp32"))),
    ],
)
def test_norms_are_those_of_the_whole_model(pool: Pool, distributed_optimizer: bool, precision: str) -> None:
    parallel = ParallelConfig(tensor=2, data=2, distributed_optimizer=distributed_optimizer)
    norms, grad_norm = pool.run(4, norms_after_a_step, parallel, precision)[0]
    checkpoint = InitialCheckpoint(replace(STAGE.model), 7)
    assert norms[f"weight_norm/{EMBEDDING}"] == pytest.approx(
        checkpoint.read(EMBEDDING).double().norm().item(), rel=1e-6
    )
    layer = [checkpoint.read(name)[3].double() for name in checkpoint.tensors if name.startswith("decoder.layers.")]
    expected = torch.stack([part.square().sum() for part in layer]).sum().sqrt().item()
    assert norms["weight_norm/layer_003"] == pytest.approx(expected, rel=1e-6)
    # Gradients are clipped to norm 1 where they are longer.
    whole = sum(value**2 for name, value in norms.items() if name.startswith("grad_norm/")) ** 0.5
    assert whole == pytest.approx(min(grad_norm, 1.0), rel=1e-4)


def test_norms_do_not_depend_on_the_layout(pool: Pool) -> None:
    single, _ = pool.run(1, norms_after_a_step, ParallelConfig())[0]
    other, _ = pool.run(4, norms_after_a_step, ParallelConfig(tensor=2, pipeline=2, sequence=True, data=1))[0]
    assert list(single) == list(other)
    assert [other[name] for name in single] == pytest.approx(list(single.values()), rel=1e-4)
