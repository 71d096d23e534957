"""Gradients of new weights open with the masks' v, dimension by dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flm_megatron.distributed.world import one_process
from flm_megatron.growth.grown.axes import axis_segments
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.schedule import mask_plan
from flm_megatron.model.masks import GrowthMasks
from flm_megatron.model.parameters import Unit, parameter_specs
from tests.support.filled_model import filled_model, gradients, seeded_batch
from tests.support.growth_cases import old_model, plan_for, trained, weights

DIMENSIONS = {"hidden": Unit.HIDDEN, "ffn": Unit.FFN, "groups": Unit.HEAD, "heads_per_group": Unit.HEAD,
              "layers": Unit.LAYER}  # fmt: skip
GPT3: dict[str, Any] = {"normalization": "layernorm", "activation": "gelu", "bias": True}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process():
        yield


def new_entries(plan: GrowthPlan, unit: Unit) -> Iterator[tuple[str, int, str, torch.Tensor]]:
    """Where every tensor that counts `unit` is new: axis, band (gate and up, query, key and value) and indices."""
    old = parameter_specs(plan.old)
    for name, spec in parameter_specs(plan.new).items():
        for number, axis in enumerate(spec.axes):
            if axis.unit is unit:
                segments = axis_segments(plan, old[name].axes[number], axis)
                new = torch.cat([torch.full((s.size,), s.copy or s.source is None) for s in segments])
                bands = [band.name for _ in range(axis.groups) for band in axis.bands for _ in range(band.size)]
                for band in dict.fromkeys(bands):
                    here = new & torch.tensor([of == band for of in bands])
                    if here.any():
                        yield name, number, band, here.nonzero().flatten()


Norms = dict[tuple[str, str], float]


def gradient_norms(plan: GrowthPlan, unit: Unit) -> dict[float, Norms]:
    """Norm of the gradients of new entries at each v; weights are random, the new ones too, and stay."""
    tensors = weights(trained(plan.new, torch.float32), plan.new)
    chunks = filled_model(plan.new, tensors)
    masks = GrowthMasks(chunks, plan.new, mask_plan(plan))
    tokens, labels = seeded_batch(plan.new, batch=2, sequence=16)
    norms = {}
    for v in (0.0, 0.001, 0.002, 0.1, 0.2, 0.5, 1.0):
        masks.set(v)
        chunks[0].zero_grad()
        chunks[0](tokens, labels=labels).sum().backward()
        found = gradients(chunks, tensors)
        norms[v] = {
            (name, band): float(found[name].index_select(axis, indices).norm())
            for name, axis, band, indices in new_entries(plan, unit)
        }
    return norms


@pytest.mark.parametrize(
    ("case", "block"),
    [*((case, {}) for case in DIMENSIONS), ("hidden", GPT3), ("ffn", GPT3)],
    ids=[*DIMENSIONS, "hidden-gpt3", "ffn-gpt3"],
)
def test_gradients_of_new_weights_go_with_v(case: str, block: dict[str, Any]) -> None:
    norms = gradient_norms(plan_for(case, "mask", old_model(**block)), DIMENSIONS[case])
    assert len(norms[1.0]) >= 2 and not any(norms[0.0].values())
    for entry, full in norms[1.0].items():
        for v in (0.1, 0.2, 0.5):  # what else changes with v (sums of norms, the loss) moves the rest
            assert 0.4 * v < norms[v][entry] / full < 2.5 * v, (entry, v)
        assert norms[0.002][entry] / norms[0.001][entry] == pytest.approx(2, rel=0.03), entry
