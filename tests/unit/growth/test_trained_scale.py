"""New entries as large as the trained ones beside them, in weights and in second moments."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, Region
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError
from flm_megatron.growth import trained_scale as measuring
from flm_megatron.growth.boundary import boundary_scale, grown_checkpoint, resumed_plan
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.grown.step_offsets import step_offsets
from flm_megatron.growth.plan import GrowthPlan, TrainedScale, make_plan
from flm_megatron.growth.trained_scale import trained_scale
from flm_megatron.model import parameters as p
from flm_megatron.model.parameters import parameter_specs
from tests.support.growth_cases import MemoryCheckpoint, growth, old_model, plan_for, trained
from tests.unit.growth.test_plan import small_run

CHANGES = {"new_scale": "trained", "optimizer_state": "grow"}
OLD = old_model(normalization="layernorm", bias=True)


def source_of_many_sizes() -> MemoryCheckpoint:
    """A trained model whose layers have weights and moments of different size."""
    source = trained(OLD, torch.float32, optimizer=True)
    for name, spec in parameter_specs(OLD).items():
        if spec.stacked:
            sizes = torch.tensor([1.0, 2.0, 4.0]).view(-1, *(1,) * (len(spec.shape) - 1))
            for prefix in ("", MASTER, EXP_AVG, EXP_AVG_SQ):
                source.values[prefix + name] *= sizes
    return source


def plan_of(source: MemoryCheckpoint, operator: str, **changes: object) -> GrowthPlan:
    """Everything grows beside the measured values of the source."""
    asked = growth(operator, **CHANGES)
    plan = plan_for("all", operator, OLD, {**CHANGES, **changes})
    return replace(plan, trained=trained_scale(source, OLD, asked, Processes()))


def old_layers(plan: GrowthPlan, values: torch.Tensor, stacked: bool) -> torch.Tensor:
    """The mean of an old tensor's layers for each layer of the grown one, of a shape that broadcasts over it."""
    if not stacked:
        return values.mean()
    means = values.flatten(1).mean(1)
    found = [means.mean() if layer.source is None else means[layer.source] for layer in plan.layer_sources]
    return torch.stack(found).view(-1, *(1,) * (values.dim() - 1))


@pytest.mark.parametrize("layers", ["mask", "random"])
def test_new_entries_are_drawn_as_large_as_the_trained_ones(layers: str) -> None:
    source = source_of_many_sizes()
    plan = plan_of(source, "mask", layers=layers, rejuvenate=0.5)
    grown = GrownCheckpoint(source, plan)
    usual = GrownCheckpoint(source, replace(plan, new_scale="init"))
    shifted = GrownCheckpoint(MemoryCheckpoint({n: t + 1 for n, t in source.values.items()}), usual.plan)
    for name, spec in parameter_specs(plan.new).items():
        found, expected = grown.read(name), usual.read(name)
        if spec.init_std:
            new = expected == shifted.read(name)  # what does not depend on old values
            rms = old_layers(plan, source.read(name).square(), spec.stacked).sqrt()
            factor = rms * grown.operators.scale(spec) / spec.init_std
            expected = torch.where(new, expected * factor, expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("operator", ["zero", "mask"])
def test_grown_second_moments_are_the_mean_of_the_trained_ones(operator: str) -> None:
    source = source_of_many_sizes()
    grown = GrownCheckpoint(source, plan_of(source, operator, rejuvenate=0.5))
    kept = GrownCheckpoint(source, replace(grown.plan, optimizer_state="keep"))
    for name, spec in parameter_specs(grown.plan.new).items():
        assert torch.equal(grown.read(EXP_AVG + name), kept.read(EXP_AVG + name))
        found, expected = grown.read(EXP_AVG_SQ + name), kept.read(EXP_AVG_SQ + name)
        mean = old_layers(grown.plan, source.read(EXP_AVG_SQ + name), spec.stacked) / grown.operators.scale(spec) ** 2
        torch.testing.assert_close(found, torch.where(expected == 0, mean, expected))
        assert not step_offsets(grown.record, name, Region.whole(spec.shape)).any()


def test_measures_are_the_same_in_blocks_and_need_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = source_of_many_sizes(), growth("mask", **CHANGES)
    whole = trained_scale(source, OLD, asked, Processes())
    bare = MemoryCheckpoint({name: source.values[name] for name in parameter_specs(OLD)})
    plan = plan_of(bare, "mask")
    assert plan.trained == TrainedScale(rms=whole.rms)  # masters are the weights in fp32
    assert GrownCheckpoint(bare, plan).read(p.HEAD).shape == (37, 33)
    monkeypatch.setattr(measuring, "BLOCK", 100)
    blocks = trained_scale(source, OLD, asked, Processes())
    for found, expected in ((blocks.rms, whole.rms), (blocks.exp_avg_sq, whole.exp_avg_sq)):
        assert all(found[name] == pytest.approx(expected[name], rel=1e-14) for name in expected)
    assert whole.rms[p.HEAD] == pytest.approx((source.values[p.HEAD].double().square().mean().sqrt().item(),))


def test_a_resumed_stage_keeps_the_scale_that_it_began_with() -> None:
    """What was measured at the boundary is in the plan, and is not measured again."""
    source, run = trained(old_model(), optimizer=True), small_run(new_scale="trained")
    measured = boundary_scale(source, run, 1, Processes)
    checkpoint, plan = grown_checkpoint(source, run, 1, trained=measured)
    assert set(plan.trained.rms) == {n for n, spec in parameter_specs(old_model()).items() if spec.init_std}
    saved = Manifest.from_json(json.loads(json.dumps(checkpoint.manifest.to_json())))
    assert resumed_plan(run, 1, saved) == plan
    with pytest.raises(RequestError, match="grown with new_scale = 'trained', and the run file now gives 'init'"):
        resumed_plan(small_run(), 1, saved)
    assert boundary_scale(source, small_run(), 1, Processes) is None


def test_layers_that_had_none_before_are_those_of_a_fresh_model() -> None:
    source = trained(replace(OLD, num_layers=0), torch.float32, optimizer=True)
    asked = growth("mask", **CHANGES)
    scale = trained_scale(source, replace(OLD, num_layers=0), asked, Processes())
    plan = make_plan(replace(OLD, num_layers=0), replace(OLD, hidden_size=33), asked, seed=5, trained=scale)
    grown, usual = GrownCheckpoint(source, plan), GrownCheckpoint(source, replace(plan, new_scale="init"))
    assert set(scale.rms) == {p.EMBEDDING, p.HEAD}
    assert torch.equal(grown.read(f"{p.FC1}.weight"), usual.read(f"{p.FC1}.weight"))
    assert not torch.equal(grown.read(p.HEAD), usual.read(p.HEAD))
    assert not grown.read(f"{EXP_AVG_SQ}{p.FC1}.weight").any()


def test_any_region_is_a_slice_of_the_whole() -> None:
    source = source_of_many_sizes()
    grown = GrownCheckpoint(source, plan_of(source, "mask"))
    for prefix in ("", EXP_AVG_SQ):
        whole = grown.read(f"{prefix}{p.QKV}.weight")
        region = Region((1, 13, 20), (3, 30, 10))
        assert torch.equal(grown.read(f"{prefix}{p.QKV}.weight", region), whole[region.slices])
