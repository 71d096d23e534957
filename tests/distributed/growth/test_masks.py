"""Growth masks in the engine against a float64 forward pass, under tensor, sequence and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flm_megatron.checkpoint.logical import EXP_AVG
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.schema import ParallelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.model.mask_plan import MaskPlan
from flm_megatron.model.parameters import parameter_specs
from tests.support.growth_cases import grown_weights, growth, old_model, trained
from tests.support.growth_oracle import logits, masks_at
from tests.support.layouts import SEQUENCE, STAGE, take_steps
from tests.support.pool import Pool

TOKENS = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(3))
VALUES = [0.0, 0.4, 1.0]
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2),
    "tensor_sequence_pipeline": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "virtual_pipeline": ParallelConfig(pipeline=2, virtual_pipeline=3),
}
GPT3: dict[str, Any] = {"normalization": "layernorm", "activation": "gelu", "bias": True}
NEOX: dict[str, Any] = {**GPT3, "parallel_residual": True, "rotary_percent": 0.7}


def grown(masked: str = "all", **changes: Any) -> GrowthPlan:
    """New query groups, new heads in old groups, and every other dimension behind masks, or one of them."""
    old = old_model(ffn_hidden_size=48, **changes)
    new = replace(old, num_attention_heads=12, num_query_groups=4, hidden_size=36, ffn_hidden_size=88, num_layers=6)
    operators = growth("mask") if masked == "all" else growth("zero", **{masked: "mask"})
    return make_plan(old, new, operators, seed=5)


def masked_run(plan: GrowthPlan, parallel: ParallelConfig, recompute: str) -> dict[str, Any]:
    """Per-token losses of each v, gradients of the first, and what is left on the modules after the last."""
    from flm_megatron.distributed.world import layout
    from flm_megatron.growth.schedule import mask_plan
    from flm_megatron.model.masks import GrowthMasks
    from tests.support.filled_model import filled_model, gradients

    with layout(parallel, timeout_s=120):
        tensors = grown_weights(plan, trained(plan.old))
        chunks = filled_model(plan.new, tensors, parallel=parallel, recompute=recompute)
        before = _fingerprint(chunks)
        masks = GrowthMasks(chunks, plan.new, mask_plan(plan))
        losses, grads = [], {}
        for v in VALUES:
            masks.set(v)
            losses.append(_losses(chunks))
            if v == 0:
                grads = gradients(chunks, tensors)
        return {"losses": losses, "gradients": grads, "clean": _fingerprint(chunks) == before and not masks.installed}


def _fingerprint(chunks: list[Any]) -> list[Any]:
    """The function each module runs and the hooks on it."""
    modules = [m for chunk in chunks for m in chunk.modules()]
    return [("forward" in vars(m), list(m._forward_hooks), list(m._forward_pre_hooks)) for m in modules]


def _losses(chunks: list[Any]) -> list[torch.Tensor]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(data: Iterator[torch.Tensor], model: Any) -> Any:
        tokens = next(data)
        losses = model(tokens, None, None, labels=tokens)
        return losses, lambda out: (out.sum(), torch.tensor(out.numel()), out.detach().clone())

    iterators = [iter(TOKENS.split(1)) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=2,
        seq_length=TOKENS.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )
    return list(outputs)


def expected_losses(plan: GrowthPlan, v: float) -> torch.Tensor:
    """Float64 losses per token."""
    out = logits(plan.new, grown_weights(plan, trained(plan.old)), TOKENS, masks_at(plan, v))
    return F.cross_entropy(out.transpose(1, 2), TOKENS, reduction="none")


def masked_runs(plans: list[GrowthPlan], parallel: ParallelConfig, recompute: str) -> list[dict[str, Any]]:
    """`masked_run` of each plan."""
    return [masked_run(plan, parallel, recompute) for plan in plans]


def check(pool: Pool, plans: list[GrowthPlan], parallel: ParallelConfig, recompute: str = "none") -> dict[str, Any]:
    """Losses at every v are the oracle's; afterwards the modules are as they were. What rank 0 found of the first."""
    ranks = pool.run(parallel.model_size, masked_runs, plans, parallel, recompute)
    for number, plan in enumerate(plans):
        for i, v in enumerate(VALUES):
            found = torch.cat(ranks[-1][number]["losses"][i])
            torch.testing.assert_close(found.double(), expected_losses(plan, v), rtol=2e-5, atol=2e-5)
        assert all(rank[number]["clean"] for rank in ranks)
    first: dict[str, Any] = ranks[0][0]
    return first


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("tensor", marks=pytest.mark.slow),
        pytest.param("tensor_sequence_pipeline", marks=pytest.mark.slow),
        "virtual_pipeline",
    ],
)
def test_masks_under_layouts(pool: Pool, layout: str) -> None:
    check(pool, [grown()], LAYOUTS[layout])


def test_each_mask_alone_and_those_of_other_blocks(pool: Pool) -> None:
    plans = [grown("hidden"), grown("ffn"), grown("heads"), grown("layers"), grown(**GPT3), grown(**NEOX)]
    check(pool, plans, ParallelConfig(tensor=2, sequence=True))


@pytest.mark.parametrize("recompute", [pytest.param("selective", marks=pytest.mark.slow), "full"])
def test_masks_with_recomputation(pool: Pool, recompute: str) -> None:
    check(pool, [grown()], ParallelConfig(tensor=2, sequence=True), recompute)


def test_closed_masks_give_old_units_their_old_gradients(pool: Pool) -> None:
    """At v = 0 the loss is a function of old units alone, so that is where the gradients are."""
    plan = grown()
    found = check(pool, [plan], ParallelConfig())["gradients"]
    tensors = {name: t.double().requires_grad_() for name, t in grown_weights(plan, trained(plan.old)).items()}
    out = logits(plan.new, tensors, TOKENS, masks_at(plan, 0.0))
    F.cross_entropy(out.transpose(1, 2), TOKENS, reduction="sum").backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name].double(), tensor.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert not found["embedding.word_embeddings.weight"][:, plan.old.hidden_size :].any()


def first_moments(path: Path, parallel: ParallelConfig) -> None:
    """Take a step with masks half open and save what it leaves, under a layout."""
    from flm_megatron.checkpoint.sharding.model_state import load_state, save_state
    from flm_megatron.distributed.world import layout
    from flm_megatron.growth.schedule import mask_plan
    from flm_megatron.model.masks import GrowthMasks
    from flm_megatron.training.step import TrainState

    plan = grown()
    with layout(parallel, timeout_s=120):
        state = TrainState(replace(STAGE, model=plan.new, parallel=parallel), SEQUENCE)
        load_state(trained(plan.new, torch.float32, optimizer=True), state.chunks, state.optimizer)
        GrowthMasks(state.chunks, plan.new, mask_plan(plan)).set(0.5)
        take_steps(state, range(1))
        save_state(path, state.chunks, state.optimizer, Manifest(position=StagePosition(1))).wait()


def test_new_weights_learn_alike_under_every_layout(pool: Pool, tmp_path: Path) -> None:
    """Adam's first moment after a step is the old one and the step's gradient."""
    everything = ParallelConfig(tensor=2, pipeline=2, data=2, sequence=True)
    pool.run(1, first_moments, tmp_path / "one", ParallelConfig())
    pool.run(8, first_moments, tmp_path / "eight", everything)
    plan, alone, shared = grown(), open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "eight")
    before = trained(plan.new, torch.float32, optimizer=True)
    for name in parameter_specs(plan.new):
        one, eight = ((c.read(EXP_AVG + name) - 0.9 * before.read(EXP_AVG + name)) for c in (alone, shared))
        assert one.any() and float((eight - one).norm() / one.norm()) < 1e-4, name


def refused() -> str:
    """Masks on a fused norm, in the shape Transformer Engine gives it."""
    from flm_megatron.model.masks import GrowthMasks

    class FusedNormLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(4))

    try:
        model: torch.nn.Module = FusedNormLinear()
        for name in ("linear_qkv", "self_attention", "0", "layers", "decoder"):
            model = torch.nn.ModuleDict({name: model})
        GrowthMasks([model], old_model(), MaskPlan(hidden=4))
    except RequestError as error:
        return str(error)
    return ""


def test_fused_norms_are_refused(pool: Pool) -> None:
    assert "cannot reach the norm inside FusedNormLinear" in pool.run(1, refused)[0]
