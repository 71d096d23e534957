"""The grown checkpoint: regions, optimizer state, new values, provenance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint.lazy.generator import truncated_normal
from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, Region
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.added import AddedEntries
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint, axis_mean
from flm_megatron.growth.grown.step_offsets import earlier_growth, has_step_offsets, step_offsets
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.growth.record import GrowthRecord, change_behind
from flm_megatron.model import parameters as p
from flm_megatron.model.parameters import parameter_specs
from tests.support.growth_cases import (
    CLONED,
    MemoryCheckpoint,
    growth,
    old_model,
    plan_for,
    trained,
)

WRITERS = {f"{p.PROJECTION}.weight", f"{p.FC2}.weight"}
GPT3 = old_model(normalization="layernorm", activation="gelu", bias=True)
CHECKPOINTS = [
    GrownCheckpoint(
        trained(model, torch.float32, optimizer=True), plan_for("all", operator, model, {"optimizer_step": "birth"})
    )
    for operator in ("zero", "mask")
    for model in (old_model(), GPT3)
]
CLONES = growth("clone", layers="random", clone_noise=0.4)
CHECKPOINTS += [
    GrownCheckpoint(
        trained(model, torch.float32, optimizer=True), make_plan(model, replace(model, **CLONED["all"]), CLONES, 5)
    )
    for model in (old_model(), GPT3, old_model(num_layers=0))
]
CHECKPOINTS += [GrownCheckpoint(CHECKPOINTS[0].source, plan_for("all", "mask", old_model(), {"shrink": 0.4}))]
WHOLE = [{name: checkpoint.read(name) for name in checkpoint.tensors} for checkpoint in CHECKPOINTS]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_region_is_a_slice_of_the_whole(data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(CHECKPOINTS) - 1))
    name = data.draw(st.sampled_from(sorted(CHECKPOINTS[index].tensors)))
    shape = CHECKPOINTS[index].tensors[name].shape
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    region = Region(offsets, sizes)
    assert torch.equal(CHECKPOINTS[index].read(name, region), WHOLE[index][name][region.slices])


@pytest.mark.parametrize(
    ("case", "selection", "name", "reads"),
    [
        ("layers", "stack", f"{p.QKV}.weight", 2),  # three old layers in one, two copies in another
        ("layers", "interleave", f"{p.QKV}.weight", 4),  # 0 and 1, 1 again, 2, 2 again
        ("groups", "stack", f"{p.QKV}.weight", 1),  # old groups lie together, as they did
        ("heads_per_group", "stack", f"{p.QKV}.weight", 3),  # queries; keys, values and the next queries; keys, values
    ],
)
def test_what_lies_together_is_read_at_once(case: str, selection: str, name: str, reads: int) -> None:
    """Each read of a checkpoint opens its file and checks whole blocks of it."""
    plan = plan_for(case, "zero", old_model(), {"layer_selection": selection})
    asked = list[Region | None]()

    class Counting(MemoryCheckpoint):
        """Notes what is read."""

        def read(self, name: str, region: Region | None = None) -> torch.Tensor:
            asked.append(region)
            return super().read(name, region)

    GrownCheckpoint(Counting(trained(plan.old, torch.float32).values), plan).read(name)
    assert len(asked) == reads


def test_mean_is_the_same_however_it_is_cut() -> None:
    values = torch.randn(101, 64)
    assert torch.equal(axis_mean(values, 0)[:, 7:9], axis_mean(values[:, 7:9], 0))
    torch.testing.assert_close(axis_mean(values, 0), values.mean(0, keepdim=True))


@pytest.mark.parametrize("operator", ["zero", "mask"])
def test_moments_follow_the_weights(operator: str) -> None:
    """A scaled weight's gradient is divided by the scale: the moments go with it, new entries have none."""
    old = old_model(mup=old_model().mup)
    plan = plan_for("hidden", operator, old)
    source = trained(old, torch.float32, optimizer=True)
    checkpoint = GrownCheckpoint(source, plan)
    scales = {
        p.HEAD: 33 / 24,
        p.FINAL_NORM + ".weight": math.sqrt(24 / 33) if operator == "zero" else 1.0,
        f"{p.FC2}.weight": 1.0,
    }
    for name, scale in scales.items():
        region = Region.whole(source.tensors[name].shape)
        for prefix, factor in (("", scale), (MASTER, scale), (EXP_AVG, 1 / scale), (EXP_AVG_SQ, scale**-2)):
            torch.testing.assert_close(checkpoint.read(prefix + name, region), source.read(prefix + name) * factor)
        new = checkpoint.read(EXP_AVG_SQ + name)
        new[region.slices] = 0
        assert not new.any()


def test_rejuvenation_undoes_what_zero_does_to_norms() -> None:
    """With the root of the ratio of the widths old and new norm weights are those of a fresh model's scale."""
    plan = plan_for("hidden", "zero", old_model(), {"rejuvenate": math.sqrt(24 / 33)})
    source = trained(plan.old)
    found = GrownCheckpoint(source, plan).read(f"{p.FINAL_NORM}.weight")
    torch.testing.assert_close(found[:24], source.values[f"{p.FINAL_NORM}.weight"])
    assert (found[24:] == 1).all()
    masked = GrownCheckpoint(source, plan_for("hidden", "mask", old_model(), {"rejuvenate": 0.5}))
    assert (masked.read(f"{p.FINAL_NORM}.weight")[24:] == 1).all()


@pytest.mark.parametrize("layers", ["copy", "random"])
def test_shrink_and_perturb(layers: str) -> None:
    """Matrices, embedding and head are a fresh model plus the shrunk old one in its place; norms and biases stay."""
    plan = plan_for("all", "mask", GPT3, {"shrink": 0.4, "layers": layers})
    assert plan.masked == () and not plan.preserving
    source = trained(plan.old)
    shrunk = GrownCheckpoint(source, plan)
    plain = GrownCheckpoint(source, replace(plan, shrink=None))
    from_nothing = GrownCheckpoint(MemoryCheckpoint({n: t * 0 for n, t in source.values.items()}), plain.plan)
    for name, spec in parameter_specs(plan.new).items():
        expected = plain.read(name)
        if spec.init_std:
            whole = Region.whole(spec.shape)
            fresh = truncated_normal(5, f"growth:big:{name}", spec.shape, whole, spec.init_std).double()
            expected = 0.4 * (expected - from_nothing.read(name)) + fresh
        torch.testing.assert_close(shrunk.read(name), expected)


@pytest.mark.parametrize(
    ("optimizer_state", "kept"), [("reset_new", (True, False)), ("keep", (True, True)), ("reset_all", (False, False))]
)
def test_moments_of_originals_and_copies(optimizer_state: str, kept: tuple[bool, bool]) -> None:
    plan = plan_for("layers", "mask", old_model(), {"optimizer_state": optimizer_state})
    source = trained(plan.old, torch.float32, optimizer=True)
    checkpoint = GrownCheckpoint(source, plan)
    name = f"{p.QKV}.weight"
    moments, values = checkpoint.read(EXP_AVG + name), checkpoint.read(name)
    for i, layer in enumerate(plan.layer_sources):
        assert torch.equal(values[i], source.values[name][layer.source])
        assert torch.equal(moments[i], source.values[EXP_AVG + name][layer.source] * kept[layer.copy])
    assert checkpoint.record.moments == (optimizer_state != "reset_all")
    assert checkpoint.record.optimizer_step == (0 if optimizer_state == "reset_all" else 40)


def test_random_layers_are_those_of_a_fresh_model() -> None:
    plan = plan_for("all", "zero", old_model(), {"layers": "random", "layer_selection": "middle"})
    checkpoint = GrownCheckpoint(trained(plan.old, torch.float32, optimizer=True), plan)
    assert [str(layer) for layer in plan.layer_sources] == ["0", "1", "random", "random", "2"]
    for name, spec in parameter_specs(plan.new).items():
        if spec.stacked:
            values, moments = checkpoint.read(name)[2:4], checkpoint.read(EXP_AVG_SQ + name)
            assert not moments[2:4].any() and moments[0].any()
            if spec.init_std:
                assert values.std().item() == pytest.approx(0.9866 * spec.init_std, rel=0.1)
                assert not torch.equal(values[0], values[1])
            else:
                assert values.unique().tolist() == [pytest.approx(plan.norm_scale)]


def test_layers_out_of_none_are_those_of_a_fresh_model() -> None:
    source = trained(old_model(num_layers=0), torch.bfloat16, optimizer=True)
    added = []
    for operator in ("zero", "mask", "copy"):
        plan = plan_for("layers", "zero", old_model(num_layers=0), {"layers": operator, "optimizer_step": "birth"})
        checkpoint = GrownCheckpoint(source, plan)
        assert [str(layer) for layer in plan.layer_sources] == ["random"] * 5
        assert checkpoint.tensors[f"{p.FC2}.weight"].dtype == torch.bfloat16
        for name, spec in parameter_specs(plan.new).items():
            if spec.stacked:
                values, zero = checkpoint.read(MASTER + name), operator == "zero" and name in WRITERS
                assert values.std().item() == pytest.approx(0 if zero else 0.9866 * spec.init_std, rel=0.1)
                assert not checkpoint.read(EXP_AVG_SQ + name).any()
                assert (step_offsets(checkpoint.record, name, Region.whole(spec.shape)) == 40).all()
        added.append(AddedEntries(plan))
    assert all(each.indices(f"{p.FC2}.weight", 2) == [True] * 50 for each in added)
    assert not any(added[0].indices(p.HEAD, 1))


def test_optimizer_fits_the_scaled_problem() -> None:
    """One Adam step in the scaled parametrization is the old step times the scale, as the moments promise."""
    old = old_model()
    plan = plan_for("hidden", "mask", old)
    source, c = trained(old, torch.float32, optimizer=True), plan.head_scale
    opened, region = GrownCheckpoint(source, plan), Region.whole((37, 24))
    gradient = torch.randn(37, 24)
    steps = []
    for checkpoint, g in ((source, gradient), (opened, gradient / c)):
        m = 0.9 * checkpoint.read(EXP_AVG + p.HEAD, region) + 0.1 * g
        s = 0.95 * checkpoint.read(EXP_AVG_SQ + p.HEAD, region) + 0.05 * g**2
        steps.append(m / s.sqrt())
    torch.testing.assert_close(steps[0], steps[1])


def test_new_values_are_those_of_a_fresh_model_of_the_new_width() -> None:
    old = old_model(hidden_size=96, ffn_hidden_size=200, matrix_init_std=0.3)
    plan = make_plan(old, replace(old, ffn_hidden_size=900), growth("mask"), seed=5)
    checkpoint = GrownCheckpoint(trained(old, torch.float32), plan)
    name = f"{p.FC1}.weight"
    new = torch.cat([checkpoint.read(name)[:, 200:900], checkpoint.read(name)[:, 1100:]])
    assert new.std().item() == pytest.approx(
        parameter_specs(plan.new)[name].init_std * 0.9866, rel=0.02
    )  # cut at 3 std
    assert torch.equal(checkpoint.read(name)[:, 900:1100], trained(old, torch.float32).values[name][:, 200:])


def test_stages_and_seeds_draw_different_numbers() -> None:
    plan = plan_for("hidden", "mask", old_model())
    source = trained(plan.old, torch.float32)
    draws = [
        GrownCheckpoint(source, GrowthPlan.from_json({**plan.to_json(), **change})).read(p.EMBEDDING)[:, 24:]
        for change in ({}, {"seed": 6}, {"stage": "bigger"})
    ]
    assert not torch.isin(draws[0], draws[1]).any()
    assert not torch.isin(draws[0], draws[2]).any()


def test_bf16_weights_are_rounded_masters() -> None:
    old = old_model()
    clones = make_plan(old, replace(old, **CLONED["all"]), CLONES, seed=5)
    for plan in (plan_for("all", "zero", old), clones, plan_for("all", "mask", old, {"shrink": 0.4})):
        checkpoint = GrownCheckpoint(trained(plan.old, torch.bfloat16, optimizer=True), plan)
        for name in parameter_specs(plan.new):
            assert torch.equal(checkpoint.read(name), checkpoint.read(MASTER + name).bfloat16()), name


def test_step_offsets() -> None:
    plan = plan_for("ffn", "zero", old_model(), {"optimizer_step": "birth"})
    once = GrownCheckpoint(trained(plan.old, torch.float32, optimizer=True), plan).record
    name, whole = f"{p.FC2}.weight", Region.whole((3, 24, 87))
    added_at = step_offsets(once, name, whole)
    assert (added_at[:, :, 50:] == 40).all() and (added_at[:, :, :50] == 0).all()
    values = trained(plan.new, torch.float32, optimizer=True).values
    held = MemoryCheckpoint(values, Manifest(position=StagePosition(optimizer_step=70), growth=once.recorded()))
    deeper = plan_for("layers", "zero", plan.new, {"optimizer_step": "birth"})
    twice = GrownCheckpoint(held, deeper).record
    added_at = step_offsets(twice, name, Region((1, 2, 48), (3, 4, 5)))
    for i, layer in enumerate(deeper.layer_sources[1:4]):
        expected = [70] * 5 if layer.copy else [0, 0, 40, 40, 40]
        assert (added_at[i] == torch.tensor(expected)).all()
    kept = GrownCheckpoint(held, plan_for("layers", "zero", plan.new)).record
    assert has_step_offsets(twice) and has_step_offsets(kept)
    assert step_offsets(kept, name, whole).unique().tolist() == [0, 40]
    assert not has_step_offsets(GrownCheckpoint(trained(plan.old), plan_for("ffn", "zero", plan.old)).record)
    copied = replace(deeper, layers="mask", optimizer_state="keep")
    assert step_offsets(GrownCheckpoint(held, copied).record, name, whole).unique().tolist() == [0, 40]
    anew = replace(deeper, optimizer_state="reset_all")
    assert not step_offsets(GrownCheckpoint(held, anew).record, name, whole).any()


def test_without_moments_every_entry_is_born_anew() -> None:
    plan = plan_for("ffn", "zero", old_model(), {"optimizer_step": "birth"})
    source = trained(plan.old, torch.float32)  # at Adam's step 40, as a copy without optimizer state still says
    bare = GrownCheckpoint(source, plan).record
    assert bare.optimizer_step == 0
    held = MemoryCheckpoint(
        trained(plan.new).values, Manifest(position=StagePosition(optimizer_step=70), growth=bare.recorded())
    )
    twice = GrownCheckpoint(held, plan_for("layers", "zero", plan.new, {"optimizer_step": "birth"})).record
    for entry, layers in ((bare, 3), (twice, 5)):
        assert not step_offsets(entry, f"{p.FC2}.weight", Region.whole((layers, 24, 87))).any()
    written_before = {key: value for key, value in bare.to_json().items() if key != "moments"} | {"optimizer_step": 40}
    assert step_offsets(GrowthRecord.from_json(written_before), f"{p.FC2}.weight", Region.whole((3, 24, 87))).any()


def test_step_offsets_outlive_the_start_of_a_new_run() -> None:
    plan = plan_for("ffn", "zero", old_model(), {"optimizer_step": "birth"})
    checkpoint = GrownCheckpoint(trained(plan.old, torch.float32, optimizer=True), plan)
    earlier = earlier_growth(checkpoint, changes=False)
    kept = Manifest(position=StagePosition(optimizer_step=50), earlier_growth=earlier)
    assert change_behind(kept) == checkpoint.record and earlier_growth(checkpoint, changes=True) is None
    resumed = MemoryCheckpoint(trained(plan.new, torch.float32, optimizer=True).values, kept)
    assert earlier_growth(resumed, changes=False) == earlier
    assert earlier_growth(MemoryCheckpoint(trained(plan.new).values, kept), changes=False) is None
    deeper = GrownCheckpoint(resumed, plan_for("layers", "zero", plan.new)).record
    assert step_offsets(deeper, f"{p.FC2}.weight", Region.whole((5, 24, 87))).unique().tolist() == [0, 40]


def test_provenance_and_wrong_source() -> None:
    plan = plan_for("ffn", "zero", old_model())
    record = GrownCheckpoint(trained(plan.old), plan).record
    assert record.plan == plan and (record.source_stage, record.source_step) == ("small", 40)
    with pytest.raises(
        RequestError, match=r"linear_fc1.weight has shape \(3, 102, 24\), the run file makes it \(3, 100, 24\)"
    ):
        GrownCheckpoint(trained(old_model(ffn_hidden_size=51)), plan)
    with pytest.raises(RequestError, match="has no tensor 'x'"):
        GrownCheckpoint(trained(plan.old), plan).read("x")
