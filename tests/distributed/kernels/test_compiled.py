"""Training steps with compiled operations: equal to those without, under parallelism and recomputation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flm_megatron import kernels
from flm_megatron.config.schema import KernelsConfig, ParallelConfig
from flm_megatron.kernels.compiled import compiler_obstacle
from tests.support.layouts import STAGE, relative_difference, train_under
from tests.support.pool import Pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler_obstacle() is not None, reason="there is no C++ compiler"),
]
COMPILE = KernelsConfig(rms_norm="compile", swiglu="compile", rotary="compile")
SMALL = replace(STAGE, model=replace(STAGE.model, num_layers=4))


def steps(parallel: ParallelConfig, config: KernelsConfig, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """Loss and gradient norm of four steps."""
    kernels.use(kernels.choose(config))
    return train_under(parallel, replace(SMALL, **changes), steps=4)


@pytest.mark.parametrize(
    ("parallel", "changes"),
    [
        (ParallelConfig(), {}),
        (ParallelConfig(), {"recompute": "full"}),
        (ParallelConfig(tensor=2, sequence=True), {"recompute": "selective"}),
        (ParallelConfig(pipeline=2), {}),
    ],
    ids=["alone", "full-recompute", "tensor-sequence-selective", "pipeline"],
)
def test_steps_are_those_without(pool: Pool, parallel: ParallelConfig, changes: dict[str, Any]) -> None:
    size = parallel.model_size
    plain = pool.run(size, steps, parallel, KernelsConfig(), changes)
    for ours, theirs in zip(pool.run(size, steps, parallel, COMPILE, changes), plain, strict=True):
        assert relative_difference(ours, theirs) < 1e-5
