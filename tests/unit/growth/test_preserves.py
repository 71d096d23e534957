"""Growth keeps the function: the algebra in float64, for every operator and dimension."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, Region
from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.growth.schedule import still_opening
from flm_megatron.model import parameters as p
from tests.support.growth_cases import (
    CLONED,
    GROWN,
    MemoryCheckpoint,
    grown_weights,
    growth,
    old_model,
    plan_for,
    trained,
    weights,
)
from tests.support.growth_oracle import Masks, logits, masks_at, open_masks
from tests.support.reference_model import reference_logits

TOKENS = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(3))
BLOCKS: dict[str, dict[str, Any]] = {
    "teleflm": {},
    "gpt2": {
        **{"normalization": "layernorm", "activation": "gelu_tanh", "bias": True},
        **{"position": "learned", "max_positions": 40},
    },
    "neox": {
        **{"normalization": "layernorm", "activation": "gelu", "bias": True},
        **{"parallel_residual": True, "rotary_percent": 0.7},
    },
    "qwen": {"mup": MupConfig(enabled=False), "qkv_bias": True, "query_key_norm": True, "activation": "geglu"},
    "tied": {"tie_embeddings": True},
}


def difference(plan: GrowthPlan, v: float = 0.0) -> float:
    """Largest difference of the logits before and after, over the standard deviation of those before."""
    source = trained(plan.old)
    before = reference_logits(plan.old, weights(source, plan.old), TOKENS)
    tensors = grown_weights(plan, source)
    after = (
        logits(plan.new, tensors, TOKENS, masks_at(plan, v))
        if plan.masked
        else reference_logits(plan.new, tensors, TOKENS)
    )
    return ((after - before).abs().max() / before.std()).item()


@pytest.mark.parametrize("block", BLOCKS)
def test_open_masks_are_the_plain_model(block: str) -> None:
    plan = plan_for("all", "mask", old_model(**BLOCKS[block]))
    tensors = grown_weights(plan, trained(plan.old))
    torch.testing.assert_close(
        logits(plan.new, tensors, TOKENS, masks_at(plan, 1.0)), reference_logits(plan.new, tensors, TOKENS)
    )


@pytest.mark.parametrize("operator", ["zero", "mask"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", GROWN)
def test_logits_stay(case: str, block: str, operator: str) -> None:
    assert difference(plan_for(case, operator, old_model(**BLOCKS[block]))) <= 1e-12


@pytest.mark.parametrize("operator", ["zero", "mask"])
@pytest.mark.parametrize("block", BLOCKS)
def test_rejuvenation_changes_no_logit(block: str, operator: str) -> None:
    old, changes = old_model(**BLOCKS[block]), {"rejuvenate": 0.37}
    assert difference(plan_for("all", operator, old, changes)) <= 1e-12
    assert difference(make_plan(old, old, growth(operator, **changes), seed=2)) <= 1e-12


@pytest.mark.parametrize("block", ["teleflm", "tied"])
@pytest.mark.parametrize("operator", ["zero", "mask"])
def test_moments_follow_the_gradients(operator: str, block: str) -> None:
    """Old entries have the moments that their gradients in the grown model would have given them."""
    plan = plan_for("hidden", operator, old_model(**BLOCKS[block], input_mult=0.5), {"rejuvenate": 0.37})
    plan.new.input_mult = 0.7
    values = trained(plan.old, optimizer=True).values
    source = MemoryCheckpoint({name: value for name, value in values.items() if not name.startswith(MASTER)})
    grown = GrownCheckpoint(source, plan)
    before = gradients(plan.old, weights(source, plan.old), open_masks(plan.old))
    after = gradients(plan.new, weights(grown, plan.new), masks_at(plan, 0.0))
    for name, old in before.items():
        region = Region.whole(tuple(old.shape))
        now = after[name][region.slices]
        for prefix, power in ((EXP_AVG, 1), (EXP_AVG_SQ, 2)):
            found = grown.read(prefix + name, region) * old**power
            torch.testing.assert_close(found, source.read(prefix + name) * now**power, rtol=1e-5, atol=1e-12)


def gradients(model: ModelConfig, tensors: dict[str, torch.Tensor], masks: Masks) -> dict[str, torch.Tensor]:
    """Gradients of the loss on TOKENS in float64."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    found = logits(model, leaves, TOKENS, masks)
    torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", ["hidden", "ffn", "groups", "heads_per_group", "heads_and_groups", "all"])
def test_clones_stay_and_their_noise_cancels(case: str, block: str) -> None:
    old = old_model(**BLOCKS[block])
    plans = [
        make_plan(old, replace(old, **CLONED[case]), growth("clone", clone_noise=noise), seed=5) for noise in (0.0, 0.4)
    ]
    assert all(difference(plan) <= 1e-12 for plan in plans)
    plain, noisy = (grown_weights(plan, trained(old)) for plan in plans)
    changed = {name for name in plain if not torch.equal(plain[name], noisy[name])}
    readers = {"ffn": {f"{p.FC2}.weight"}, "hidden": {f"{p.QKV}.weight", f"{p.FC1}.weight", p.HEAD}}
    heads = {f"{p.PROJECTION}.weight"}
    expected = set().union(*readers.values(), heads) if case == "all" else readers.get(case, heads)
    assert changed == expected & plain.keys()


@pytest.mark.parametrize("block", BLOCKS)
def test_moments_of_clones_are_those_of_the_gradients_they_get(block: str) -> None:
    """Gradients of the old model as its moments, grown, are those of the grown one, of copies too if they are kept."""
    old = old_model(**BLOCKS[block], input_mult=0.5)
    new = replace(old, **{**CLONED["all"], "num_layers": 3}, input_mult=0.7)
    plan, source = make_plan(old, new, growth("clone", rejuvenate=0.37), seed=5), trained(old)
    before = gradients(old, weights(source, old), open_masks(old))
    after = gradients(plan.new, grown_weights(plan, source), open_masks(plan.new))
    moments = {EXP_AVG + name: gradient for name, gradient in before.items()}
    moments |= {EXP_AVG_SQ + name: gradient**2 for name, gradient in before.items()}
    held = MemoryCheckpoint({**source.values, **moments})
    grown, kept = GrownCheckpoint(held, plan), GrownCheckpoint(held, replace(plan, optimizer_state="keep"))
    for name, gradient in after.items():
        for prefix, power in ((EXP_AVG, 1), (EXP_AVG_SQ, 2)):
            found = grown.read(prefix + name)
            assert found.count_nonzero() == before[name].count_nonzero()
            torch.testing.assert_close(found, gradient**power * (found != 0), rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(kept.read(prefix + name), gradient**power, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("operator", ["zero", "mask", "clone"])
def test_multi_head_attention_stays(operator: str) -> None:
    old = old_model(num_query_groups=None)
    new = replace(old, num_attention_heads=7, hidden_size=48)
    assert difference(make_plan(old, new, growth(operator), seed=2)) <= 1e-12


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dimension", ["hidden", "ffn", "heads", "layers"])
def test_operators_mix(dimension: str, block: str) -> None:
    old = old_model(**BLOCKS[block])
    new = replace(old, **CLONED["all"])
    mixes = [("zero", "mask"), ("mask", "zero"), ("zero", "clone"), ("mask", "clone")]
    if dimension == "layers":
        mixes = [("zero", "mask"), ("mask", "zero")]
    for others, one in mixes:
        noise = {"clone_noise": 0.4} if one == "clone" else {}
        assert difference(make_plan(old, new, growth(others, **{dimension: one}, **noise), seed=5)) <= 1e-12


@pytest.mark.parametrize("block", ["teleflm", "gpt2"])
@pytest.mark.parametrize("operator", ["zero", "mask"])
@pytest.mark.parametrize("first", ["hidden", "ffn", "heads_and_groups", "layers"])
def test_a_model_behind_half_open_masks_grows_in_the_other_dimensions(first: str, operator: str, block: str) -> None:
    earlier = plan_for(first, "mask", old_model(**BLOCKS[block]))
    source = trained(earlier.new)
    before = logits(earlier.new, weights(source, earlier.new), TOKENS, masks_at(earlier, 0.5))
    kept = {field: getattr(earlier.new, field) for field in GROWN[first]}
    new = replace(earlier.new, **{**GROWN["all"], **kept})
    plan = make_plan(earlier.new, new, growth(operator), seed=5, stage="bigger")
    plan = replace(plan, earlier_masks=still_opening(earlier, 2))
    after = logits(plan.new, grown_weights(plan, source), TOKENS, masks_at(plan, 0.0))
    assert (after - before).abs().max() / before.std() <= 1e-12
    opened = replace(plan, earlier_masks=())
    without = logits(plan.new, grown_weights(plan, source), TOKENS, masks_at(opened, 0.0))
    assert (without - before).abs().max() / before.std() > 1e-3, "the earlier masks matter"


def test_multipliers_may_change_at_growth() -> None:
    old = old_model()
    plan = plan_for("all", "zero", old)
    plan.new.output_mult, plan.new.input_mult = 3.0, 0.7
    assert difference(plan) <= 1e-12


@pytest.mark.parametrize("case", ["hidden", "ffn", "groups", "layers"])
def test_open_masks_change_the_function(case: str) -> None:
    assert difference(plan_for(case, "mask", old_model()), v=0.5) > 1e-3


@pytest.mark.parametrize("layers", ["copy", "random"])
def test_plain_copies_and_random_layers_do_not_preserve(layers: str) -> None:
    plan = plan_for("layers", "zero", old_model(), {"layers": layers})
    assert not plan.preserving
    assert difference(plan) > 1e-3


@pytest.mark.parametrize("operator", ["zero", "mask"])
@pytest.mark.parametrize("block", BLOCKS)
def test_plain_copies_in_a_wider_model_compute_what_they_do_in_the_old_one(block: str, operator: str) -> None:
    old = old_model(**BLOCKS[block])
    deep = plan_for("layers", operator, old, {"layers": "copy"})
    before = reference_logits(deep.new, grown_weights(deep, trained(old)), TOKENS)
    plan = plan_for("all", operator, old, {"layers": "copy"})
    after = logits(plan.new, grown_weights(plan, trained(old)), TOKENS, masks_at(plan, 0.0))
    assert not plan.preserving and (after - before).abs().max() <= 1e-12 * before.std()


@pytest.mark.parametrize("operator", ["zero", "mask", "clone"])
@pytest.mark.parametrize("block", BLOCKS)
def test_no_layer_and_one_grow_into_many(block: str, operator: str) -> None:
    for layers in (0, 1):
        old = old_model(num_layers=layers, **BLOCKS[block])
        chosen = growth(operator, layer_selection="distance")
        assert difference(make_plan(old, replace(old, **CLONED["all"]), chosen, seed=5)) <= 1e-12
    assert not make_plan(old, replace(old, num_layers=3), growth(operator, layers="copy"), seed=5).preserving


@pytest.mark.parametrize("case", ["hidden", "ffn", "groups", "heads_per_group", "layers"])
def test_zero_growth_trains_its_new_weights(case: str) -> None:
    """Each new unit is reached by a gradient after one step, so that nothing stays dead or equal."""
    plan = plan_for(case, "zero", old_model())
    tensors = {n: t.requires_grad_() for n, t in grown_weights(plan, trained(plan.old)).items()}
    start = {n: t.detach().clone() for n, t in tensors.items()}
    for _ in range(2):
        torch.nn.functional.cross_entropy(logits(plan.new, tensors, TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        with torch.no_grad():
            for t in tensors.values():
                assert t.grad is not None
                t -= 0.1 * t.grad
                t.grad = None
    unmoved = [
        n
        for n, t in tensors.items()
        if n.endswith("weight") and (t == start[n]).flatten(1 - (t.ndim < 2)).all(-1).any()
    ]
    assert [n for n in unmoved if "embedding" not in n] == []
