"""Smaller models beside ones pruned by hand, and the way back from every growth by `zero`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER, Region
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.schema import ModelConfig, MupConfig, ShrinkConfig
from flm_megatron.growth.grown.added import AddedEntries
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.grown.step_offsets import earlier_growth, step_offsets
from flm_megatron.growth.plan import GrowthPlan
from flm_megatron.growth.record import ChangeRecord, change_behind, shrinking_of
from flm_megatron.growth.shrink import gather
from flm_megatron.growth.shrink.checkpoint import ShrunkCheckpoint
from flm_megatron.growth.shrink.choice import make_shrink_plan
from flm_megatron.growth.shrink.importance import Importance
from flm_megatron.growth.shrink.plan import ShrinkPlan
from flm_megatron.model import parameters as p
from tests.support.growth_cases import MemoryCheckpoint, old_model, plan_for, trained, weights
from tests.support.reference_model import reference_logits
from tests.support.shrink_cases import SMALLER, drawn_importance, shrink_plan

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
    "qwen": {"mup": MupConfig(enabled=False), "qkv_bias": True, "query_key_norm": True},
    "tied": {"tie_embeddings": True},
}


def importance_of_old(plan: GrowthPlan) -> Importance:
    """What a measurement says of a model that has just grown by `zero`: what was added matters nothing."""
    added = AddedEntries(plan)

    def old(name: str, axis: int) -> torch.Tensor:
        """1 for the old indices of an axis."""
        return 1 - torch.tensor(added.indices(name, axis), dtype=torch.float64)

    new, drawn = plan.new, drawn_importance(plan.new)
    ffn = old(f"{p.FC2}.weight", 2)
    heads = old(f"{p.PROJECTION}.weight", 2).view(new.num_attention_heads, -1)[:, 0]
    hidden = old(p.EMBEDDING, 1)
    return replace(
        drawn,
        hidden=hidden,
        ffn=ffn.expand(new.num_layers, -1) + 0,
        heads=heads.expand(new.num_layers, -1) + 0,
        layers=old(f"{p.FC2}.weight", 0),
        energy=drawn.energy * hidden,
    )


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", ["all", "deep", "heads_and_groups"])
def test_a_model_that_grew_by_zero_is_shrunk_to_the_old_one(case: str, block: str) -> None:
    plan = plan_for(case, "zero", old_model(**BLOCKS[block]))
    source = trained(plan.old)
    grown = GrownCheckpoint(source, plan)
    back = make_shrink_plan(plan.new, plan.old, ShrinkConfig(), importance_of_old(plan), "small")
    shrunk = ShrunkCheckpoint(grown, back)
    assert back.new.norm_epsilon == pytest.approx(plan.old.norm_epsilon, rel=1e-12)
    before = reference_logits(plan.old, weights(source, plan.old), TOKENS)
    after = reference_logits(back.new, weights(shrunk, back.new), TOKENS)
    assert ((after - before).abs().max() / before.std()).item() <= 1e-12


@pytest.mark.parametrize("block", ["teleflm", "tied"])
def test_masters_and_moments_come_back_with_the_weights(block: str) -> None:
    plan = plan_for("all", "zero", old_model(**BLOCKS[block]))
    source = trained(plan.old, torch.bfloat16, optimizer=True)
    back = make_shrink_plan(plan.new, plan.old, ShrinkConfig(), importance_of_old(plan), "small")
    shrunk = ShrunkCheckpoint(GrownCheckpoint(source, plan), back)
    assert {name: info.dtype for name, info in shrunk.tensors.items()} == {
        name: info.dtype for name, info in source.tensors.items()
    }
    for name in source.tensors:
        if name.startswith("optimizer."):
            torch.testing.assert_close(shrunk.read(name), source.read(name), rtol=1e-6, atol=0)


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the largest scores, in their order."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def pruned_by_hand(plan: ShrinkPlan, source: MemoryCheckpoint, importance: Importance, prefix: str = "") -> Any:
    """The source's tensors with everything but the most important units cut away, tensor by tensor; unscaled."""
    old, new = plan.old, plan.new
    hidden, layers = best(importance.hidden.tolist(), new.hidden_size), best(importance.layers.tolist(), new.num_layers)
    queries, kept = old.num_attention_heads // old.query_groups, new.num_attention_heads // new.query_groups
    out: dict[str, list[torch.Tensor] | torch.Tensor] = {}
    for name in p.parameter_specs(old):
        whole = source.values[prefix + name]
        stacked = name.startswith("decoder.layers.")
        parts = []
        for index in layers if stacked else [None]:
            value = whole if index is None else whole[index]
            ffn = best(importance.ffn[index or 0].tolist(), new.ffn_hidden_size)
            by_group = importance.heads[index or 0].view(old.query_groups, queries)
            groups = best(by_group.sum(1).tolist(), new.query_groups)
            heads = [best(by_group[group].tolist(), kept) for group in groups]
            if "embedding" in name or "output_layer" in name:
                value = value[:, hidden]
            elif "linear_qkv." in name and not name.endswith(("layer_norm_weight", "layer_norm_bias")):
                shaped = value.view(old.query_groups, queries + 2, old.kv_channels, *value.shape[1:])
                rows = [shaped[g][[*mine, queries, queries + 1]] for g, mine in zip(groups, heads, strict=True)]
                value = torch.cat(rows).flatten(0, 1)
                value = value[:, hidden] if value.dim() > 1 else value
            elif name.endswith("linear_proj.weight"):
                shaped = value.view(old.hidden_size, old.query_groups, queries, old.kv_channels)
                columns = [shaped[:, g][:, mine] for g, mine in zip(groups, heads, strict=True)]
                value = torch.cat(columns, 1).flatten(1)[hidden]
            elif name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
                value = torch.cat([half[ffn] for half in value.chunk(2 if old.gated else 1)])
                value = value[:, hidden] if value.dim() > 1 else value
            elif name.endswith("linear_fc2.weight"):
                value = value[hidden][:, ffn]
            elif "q_layernorm" not in name and "k_layernorm" not in name:  # norms, and what writes the residual stream
                value = value[hidden]
            parts.append(value)
        out[name] = torch.stack(parts) if stacked else parts[0]
    return out


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", SMALLER)
def test_what_is_kept_is_what_is_cut_out_by_hand(case: str, block: str) -> None:
    """Without factors: those on norms and for multipliers are left out, by the plan and by a tested property."""
    old = old_model(**{**BLOCKS[block], "mup": MupConfig(enabled=False)})
    plan = shrink_plan(old, case, rescale_norms=False)
    source = trained(old, torch.float32, optimizer=True)
    shrunk = ShrunkCheckpoint(source, plan)
    for prefix in ("", MASTER, EXP_AVG, EXP_AVG_SQ):
        for name, value in pruned_by_hand(plan, source, drawn_importance(old), prefix).items():
            assert torch.equal(shrunk.read(prefix + name), value), prefix + name
            assert shrunk.tensors[prefix + name].shape == value.shape


def test_factors_on_norms_and_for_multipliers() -> None:
    """Each norm takes the mean square of the kept channels for that of all; moments go the other way."""
    old, importance = old_model(), drawn_importance(old_model())
    plan, source = shrink_plan(old), trained(old, torch.float32, optimizer=True)
    plain = pruned_by_hand(plan, source, importance)
    hidden = sorted(importance.hidden.argsort(descending=True)[: plan.new.hidden_size].tolist())
    layers = sorted(importance.layers.argsort(descending=True)[: plan.new.num_layers].tolist())
    rows = [*(2 * layer + place for layer in layers for place in (0, 1)), 2 * old.num_layers]
    wider = old.hidden_size / plan.new.hidden_size
    scales = (importance.energy[rows][:, hidden].sum(1) / importance.energy[rows].sum(1) * wider).sqrt()
    torch.testing.assert_close(torch.tensor(plan.norm_scales, dtype=torch.float64), scales)
    assert plan.new.norm_epsilon == pytest.approx(old.norm_epsilon * scales.square().mean().item())
    factors: dict[str, Any] = dict.fromkeys(plain, 1.0)
    factors |= {f"{p.ATTENTION_NORM}_weight": scales[0:-1:2, None], f"{p.MLP_NORM}_weight": scales[1:-1:2, None]}
    factors |= {f"{p.FINAL_NORM}.weight": scales[-1], p.HEAD: plan.new.hidden_size / old.hidden_size}
    shrunk = ShrunkCheckpoint(source, plan)
    for name, value in plain.items():
        torch.testing.assert_close(shrunk.read(name).double(), value.double() * factors[name], rtol=1e-6, atol=1e-7)
        for prefix, power in ((EXP_AVG, 1), (EXP_AVG_SQ, 2)):
            moments = pruned_by_hand(plan, source, importance, prefix)[name]
            expected = moments.double() / factors[name] ** power
            torch.testing.assert_close(shrunk.read(prefix + name).double(), expected, rtol=1e-5, atol=1e-7)


def test_any_region_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = shrink_plan(old_model())
    shrunk = ShrunkCheckpoint(trained(old_model(), torch.float32), plan)
    wholes = {name: shrunk.read(name) for name in shrunk.tensors}
    largest = 0

    def counted(name: str, region: Region | None = None) -> torch.Tensor:
        """A read of the source, whose size is kept."""
        nonlocal largest
        assert region is not None
        largest = max(largest, region.numel)
        return trained(old_model(), torch.float32).read(name, region)

    monkeypatch.setattr(shrunk.source, "read", counted)
    monkeypatch.setattr(gather, "BLOCK", 7)
    for name in (f"{p.QKV}.weight", f"{p.FC1}.weight", f"{p.MLP_NORM}_weight", p.EMBEDDING):
        shape = shrunk.tensors[name].shape
        sizes = tuple(max(1, size // 2) for size in shape)
        for region in (Region(tuple(size // 3 for size in shape), sizes), Region(sizes, (1,) * len(shape))):
            assert torch.equal(shrunk.read(name, region), wholes[name][region.slices])
    assert largest <= 7


def test_the_plan_comes_back_out_of_a_manifest() -> None:
    source = trained(old_model(), torch.float32, optimizer=True)
    shrunk = ShrunkCheckpoint(source, shrink_plan(old_model()))
    again = Manifest.from_json(shrunk.manifest.to_json())
    record = shrinking_of(again)
    assert record == shrunk.record == change_behind(again) and record is not None
    assert record.plan.layers.indices(0).tolist() == shrunk.plan.layers.indices(0).tolist()
    measured = record.plan.importance_of
    assert measured and record.notice is None, "the source has no hash"
    assert replace(record, source_logical_hash=measured).notice is None
    assert f"on a checkpoint of hash {measured}, not" in str(replace(record, source_logical_hash="cd").notice)


def test_step_offsets_of_a_growth_follow_what_is_kept() -> None:
    growth = plan_for("all", "zero", old_model(), {"optimizer_step": "birth"})
    grown = GrownCheckpoint(trained(old_model(), torch.float32, optimizer=True), growth)
    later = trained(growth.new, torch.float32, optimizer=True)
    later.manifest |= Manifest(growth=grown.record.recorded())
    shrunk = ShrunkCheckpoint(later, shrink_plan(growth.new, "all"))
    name = f"{p.FC1}.weight"
    offsets = MemoryCheckpoint({name: step_offsets(grown.record, name, Region.whole(later.tensors[name].shape))})
    found = step_offsets(shrunk.record, name, Region.whole(shrunk.tensors[name].shape))
    assert torch.equal(found, ShrunkCheckpoint(_with(later, name, offsets), shrunk.plan).read(name)) and found.any()
    assert earlier_growth(shrunk, changes=True) is None
    kept = earlier_growth(MemoryCheckpoint(later.values, shrunk.manifest), changes=False)
    assert kept is not None and ChangeRecord.from_json(kept.saved) == shrunk.record


def _with(source: MemoryCheckpoint, name: str, values: MemoryCheckpoint) -> MemoryCheckpoint:
    """The weights of `source` with other values of one of them."""
    plain = {each: value for each, value in source.values.items() if not each.startswith("optimizer.")}
    return MemoryCheckpoint({**plain, name: values.values[name]})


def test_transformers_pruned_by_hand_computes_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 4}
    common: dict[str, Any] = {"head_dim": 6, "vocab_size": 37, "rms_norm_eps": 1e-3, "tie_word_embeddings": False}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig.from_dict({**sizes, "num_key_value_heads": 2, **common})).eval()
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.2)
    llama.save_pretrained(tmp_path / "large")
    source = HuggingFaceCheckpoint(tmp_path / "large")
    small = replace(source.config, hidden_size=14, ffn_hidden_size=21, num_layers=2, head_dim=6)
    small = replace(small, num_attention_heads=2, num_query_groups=1)
    importance = drawn_importance(source.config)
    plan = make_shrink_plan(source.config, small, ShrinkConfig(rescale_norms=False), importance, "small")
    write_hugging_face(ShrunkCheckpoint(source, plan), plan.new, tmp_path / "small", ExportOptions(flavour="llama"))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()

    hidden = importance.hidden.topk(14).indices.sort().values
    layers = importance.layers.topk(2).indices.sort().values.tolist()
    values = {}
    for name, value in llama.state_dict().items():
        if ".layers." not in name:
            values[name] = value[..., hidden]
            continue
        old = int(name.split(".")[2])
        if old not in layers:
            continue
        group = importance.heads[old].view(2, 2).sum(1).argmax().item()
        ffn = importance.ffn[old].topk(21).indices.sort().values
        if "q_proj" in name:
            value = value.view(2, 12, 24)[group][:, hidden]
        elif "k_proj" in name or "v_proj" in name:
            value = value.view(2, 6, 24)[group][:, hidden]
        elif "o_proj" in name:
            value = value.view(24, 2, 12)[hidden][:, group]
        elif "gate_proj" in name or "up_proj" in name:
            value = value[ffn][:, hidden]
        elif "down_proj" in name:
            value = value[hidden][:, ffn]
        else:
            value = value[hidden]
        values[name.replace(f".{old}.", f".{layers.index(old)}.", 1)] = value
    sizes = {"hidden_size": 14, "intermediate_size": 21, "num_hidden_layers": 2, "num_attention_heads": 2}
    pruned = LlamaForCausalLM(LlamaConfig.from_dict({**sizes, "num_key_value_heads": 1, **common})).eval()
    pruned.load_state_dict(values)
    with torch.no_grad():
        torch.testing.assert_close(written(TOKENS).logits, pruned(TOKENS).logits, rtol=0, atol=0)


def test_models_without_layers() -> None:
    """Depth can be cut away altogether; embedding, final norm and head are left."""
    old = old_model()
    new = ModelConfig(**{**{k: v for k, v in vars(old).items() if not k.startswith("_")}, "num_layers": 0})
    plan = make_shrink_plan(old, new, ShrinkConfig(), drawn_importance(old), "small")
    shrunk = ShrunkCheckpoint(trained(old), plan)
    assert set(shrunk.tensors) == {p.EMBEDDING, f"{p.FINAL_NORM}.weight", p.HEAD}
    assert ShrinkPlan.from_json(plan.to_json()) == plan
