"""Growth masks in the engine against a float64 forward pass, under tensor, sequence and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.model.mask_plan import MaskPlan
from tests.support.growth_cases import grown_weights, growth, old_model, trained
from tests.support.growth_oracle import logits, masks_at
from tests.support.pool import Pool

TOKENS = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(3))
VALUES = [0.0, 0.4, 1.0]
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2),
    "tensor_sequence_pipeline": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "virtual_pipeline": ParallelConfig(pipeline=2, virtual_pipeline=3),
}
GPT3: dict[str, Any] = {"normalization": "layernorm", "activation": "gelu", "bias": True}


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


def check(pool: Pool, plan: GrowthPlan, parallel: ParallelConfig, recompute: str = "none") -> list[dict[str, Any]]:
    """Losses at every v are the oracle's; afterwards the modules are as they were."""
    ranks = pool.run(parallel.model_size, masked_run, plan, parallel, recompute)
    for i, v in enumerate(VALUES):
        found = torch.cat(ranks[-1]["losses"][i])
        torch.testing.assert_close(found.double(), expected_losses(plan, v), rtol=2e-5, atol=2e-5)
    assert all(rank["clean"] for rank in ranks)
    return ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_under_layouts(pool: Pool, layout: str) -> None:
    check(pool, grown(), LAYOUTS[layout])


@pytest.mark.parametrize("masked", ["hidden", "ffn", "heads", "layers"])
def test_each_mask_alone(pool: Pool, masked: str) -> None:
    check(pool, grown(masked), ParallelConfig(tensor=2, sequence=True))


def test_masks_of_the_gpt3_block(pool: Pool) -> None:
    check(pool, grown(**GPT3), ParallelConfig(tensor=2, sequence=True))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_masks_with_recomputation(pool: Pool, recompute: str) -> None:
    check(pool, grown(), ParallelConfig(tensor=2, sequence=True), recompute)


def test_closed_masks_give_old_units_their_old_gradients(pool: Pool) -> None:
    """At v = 0 the loss is a function of old units alone, so that is where the gradients are."""
    plan = grown()
    found = check(pool, plan, ParallelConfig())[0]["gradients"]
    tensors = {name: t.double().requires_grad_() for name, t in grown_weights(plan, trained(plan.old)).items()}
    out = logits(plan.new, tensors, TOKENS, masks_at(plan, 0.0))
    F.cross_entropy(out.transpose(1, 2), TOKENS, reduction="sum").backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name].double(), tensor.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert not found["embedding.word_embeddings.weight"][:, plan.old.hidden_size :].any()


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
