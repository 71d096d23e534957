"""Statistics of layers are those of the whole weights and activations, and the same under every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.config.schema import ParallelConfig
from flm_megatron.training.hooks.layer_statistics import WatchedStep
from tests.support.layouts import STAGE, take_steps, train_state_under
from tests.support.pool import Pool

FROZEN = replace(STAGE, optimizer=replace(STAGE.optimizer, lr=1e-30, matrix_lr=1e-30, min_lr=0, weight_decay=0))
Outputs = dict[int, list[torch.Tensor]]


def statistics(parallel: ParallelConfig) -> tuple[dict[str, float], Outputs]:
    """Statistics of a step that moves nothing, and what layers of this rank gave."""
    from flm_megatron.engine.transformer import TransformerLayer

    outputs: Outputs = {}
    with train_state_under(parallel, FROZEN) as state:
        step = WatchedStep(state)
        for chunk in state.chunks:
            for part in chunk.modules():
                if isinstance(part, TransformerLayer):
                    part.register_forward_hook(
                        lambda layer, args, out: outputs.setdefault(layer.layer_number - 1, []).append(out[0].detach())
                    )
        take_steps(state, range(1))
        found = step.finish()
        seen = sum(map(len, outputs.values()))
        take_steps(state, range(1, 2))
        assert sum(map(len, outputs.values())) == 2 * seen and not step.handles
        return found, {layer: each[: len(each) // 2] for layer, each in outputs.items()}


def test_they_are_those_of_the_whole_model(pool: Pool) -> None:
    single, outputs = pool.run(1, statistics, ParallelConfig())[0]
    checkpoint = InitialCheckpoint(replace(STAGE.model), 7)
    last = STAGE.model.num_layers - 1
    names = [name for name in checkpoint.tensors if name.startswith("decoder.layers.")]
    weights = torch.cat([checkpoint.read(name)[last].double().flatten() for name in names])
    given = torch.cat([part.double().flatten() for part in outputs[last]])
    for kind, values in (("weight", weights), ("activation", given)):
        assert single[f"{kind}_rms/layer_{last:03d}"] == pytest.approx(values.square().mean().sqrt().item(), rel=1e-6)
        assert single[f"{kind}_max/layer_{last:03d}"] == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert len(single) == 4 * STAGE.model.num_layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(tensor=2, pipeline=2, sequence=True, data=1),
        ParallelConfig(tensor=2, data=2, distributed_optimizer=True),
    ],
)
def test_they_do_not_depend_on_the_layout(pool: Pool, layout: ParallelConfig) -> None:
    single, _ = pool.run(1, statistics, ParallelConfig())[0]
    for found, _ in pool.run(4, statistics, layout):
        assert found == pytest.approx(single, rel=1e-5)
