"""Exports in the middle of a growth mask: refused, or folded in where weights can say the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import GrowthConfig, ModelConfig
from flm_megatron.growth.grown.folding import folded as folded_in
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.growth.schedule import still_opening
from tests.support.checkpoint_cases import Memory, flm_checkpoint, manifest_of
from tests.support.growth_oracle import logits, masks_at
from tests.support.reference_model import random_tensors, reference_logits

OLD = ModelConfig(
    num_layers=2, hidden_size=24, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2, head_dim=4,
    vocab_size=77,
)  # fmt: skip
WIDER = replace(OLD, ffn_hidden_size=36, num_attention_heads=12, num_query_groups=4)
MASKED = GrowthConfig(hidden="mask", ffn="mask", heads="mask", layers="mask", mask_steps=8, layer_selection="top")
TOKENS = torch.arange(30).view(2, 15) * 5 % 77


def save(path: Path, new: ModelConfig, step: int) -> tuple[GrowthPlan, dict[str, torch.Tensor]]:
    """A checkpoint of `new` at a step of its growth out of OLD; its plan and weights."""
    return save_plan(path, make_plan(OLD, new, MASKED, seed=1, stage="small"), step)


def save_plan(path: Path, plan: GrowthPlan, step: int) -> tuple[GrowthPlan, dict[str, torch.Tensor]]:
    """The same of a growth by this plan."""
    values = random_tensors(plan.new)
    copy_checkpoint(Memory(values), path, manifest_of(plan.new, step=step, growth={"plan": plan.to_json()}))
    return plan, values


def test_masks_on_heads_and_feed_forward_units_are_folded_in(tmp_path: Path) -> None:
    from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint

    plan, values = save(tmp_path / "a", WIDER, step=2)
    assert flm_checkpoint("export-hf", tmp_path / "a", tmp_path / "out", "--fold-mask") == 0
    checkpoint: LogicalCheckpoint = HuggingFaceCheckpoint(tmp_path / "out")
    folded = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    masked = logits(plan.new, values, TOKENS, masks_at(plan, 0.25))
    torch.testing.assert_close(reference_logits(plan.new, folded, TOKENS), masked, rtol=1e-9, atol=1e-9)
    open_model = reference_logits(plan.new, {name: value.double() for name, value in values.items()}, TOKENS)
    assert (open_model - masked).abs().max() > 1e-3, "the mask matters"


def test_a_half_open_mask_is_refused_unless_folding_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", WIDER, step=2)
    assert flm_checkpoint("export-hf", tmp_path / "a", tmp_path / "out") == 2
    assert "in the middle of its growth mask (v = 0.250" in capsys.readouterr().err
    save(tmp_path / "open", WIDER, step=8)
    assert flm_checkpoint("export-hf", tmp_path / "open", tmp_path / "out") == 0


def test_masks_of_an_earlier_growth_are_folded_in_too(tmp_path: Path) -> None:
    earlier = make_plan(OLD, replace(OLD, ffn_hidden_size=36), MASKED, seed=1, stage="before")
    plan = make_plan(earlier.new, WIDER, replace(MASKED, mask_steps=4), seed=1, stage="small")
    plan, values = save_plan(tmp_path / "a", replace(plan, earlier_masks=still_opening(earlier, 2)), step=2)
    folded = folded_in(open_checkpoint(tmp_path / "a"), fold=True)
    found = {name: folded.read(name).double() for name in values}
    at_half = replace(plan, earlier_masks=still_opening(plan, 2)[:1])
    masked = logits(plan.new, values, TOKENS, masks_at(at_half, 0.5))
    torch.testing.assert_close(reference_logits(plan.new, found, TOKENS), masked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("new", "dimension"),
    [(replace(OLD, hidden_size=48, head_dim=4), "hidden"), (replace(OLD, num_layers=3), "layers")],
    ids=["hidden", "layers"],
)
def test_masks_that_no_weights_can_say_are_not_folded(
    tmp_path: Path, new: ModelConfig, dimension: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", new, step=2)
    assert flm_checkpoint("export-hf", tmp_path / "a", tmp_path / "out", "--fold-mask") == 2
    assert f"growth mask on {dimension} (v = 0.250) cannot be folded" in capsys.readouterr().err
    assert flm_checkpoint("reshard", tmp_path / "a", tmp_path / "out", "--format", "classic") == 2
    assert not (tmp_path / "out").exists()
