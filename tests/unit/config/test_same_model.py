"""What counts as another model: exactly what changes the logits that plain PyTorch computes from the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flm_megatron.config.same_model import differences, laid_over
from flm_megatron.config.schema import LoraConfig, ModelConfig, MupConfig, RopeScaling
from tests.support.reference_model import random_tensors, reference_logits

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=40,
    num_attention_heads=12,
    vocab_size=31,
    input_mult=1.5,
    output_mult=2.0,
    mup=MupConfig(enabled=True, base_hidden_size=24),
)
IDS = torch.arange(36).view(2, 18) * 5 % 31
XPOS = replace(MODEL, position="xpos")
LEARNED = replace(MODEL, position="learned", max_positions=30)
LINEAR = replace(MODEL, rope_scaling=RopeScaling("linear", 2.0))
NORMED = replace(MODEL, query_key_norm=True)

OTHER: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "heads": (MODEL, {"num_attention_heads": 6}),
    "position": (MODEL, {"position": "xpos"}),
    "xpos_scale_base": (XPOS, {"xpos_scale_base": 64.0}),
    "rotary_percent": (MODEL, {"rotary_percent": 0.5}),
    "parallel_residual": (MODEL, {"parallel_residual": True}),
    "rope_theta": (MODEL, {"rope_theta": 500000.0}),
    "rope_scaling": (MODEL, {"rope_scaling": RopeScaling("linear", 2.0)}),
    "norm_epsilon": (MODEL, {"norm_epsilon": 1e-2}),
    "sliding_window": (MODEL, {"sliding_window": 17}),
    "tie_embeddings": (MODEL, {"tie_embeddings": True}),
    "query_key_norm_epsilon": (NORMED, {"query_key_norm_epsilon": 1e-2}),
    "input_mult": (MODEL, {"input_mult": 1.0}),
    "output_mult": (MODEL, {"output_mult": 1.0}),
    "mup base": (MODEL, {"mup": MupConfig(enabled=True, base_hidden_size=12)}),
    "mup off": (MODEL, {"mup": MupConfig()}),
}
SAME: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "head_dim": (MODEL, {"head_dim": 4}),
    "num_query_groups": (MODEL, {"num_query_groups": 12}),
    "constants of another scaling": (LINEAR, {"rope_scaling": RopeScaling("linear", 2.0, original_length=7)}),
    "init": (MODEL, {"matrix_init_std": 0.5, "vector_init_std": 0.5, "head_init_std": 0.25}),
    "xpos_scale_base": (MODEL, {"xpos_scale_base": 64.0}),
    "rope_theta": (LEARNED, {"rope_theta": 500000.0}),
    "mup off, its factor in output_mult": (MODEL, {"mup": MupConfig(), "output_mult": 1.0}),
    "base of no mup": (replace(MODEL, mup=MupConfig()), {"mup": MupConfig(base_hidden_size=7)}),
    "query_key_norm_epsilon": (NORMED, {"query_key_norm_epsilon": 1e-5}),
    "as many channels that turn": (replace(MODEL, rotary_percent=0.5), {"rotary_percent": 0.6}),
    "rounding": (MODEL, {"norm_epsilon": 1e-5 * (1 + 1e-9)}),
}


def logits(model: ModelConfig) -> torch.Tensor:
    """Logits of the same weights as `model` computes them, in float64."""
    drawn = replace(MODEL, matrix_init_std=0.4, query_key_norm=model.query_key_norm, max_positions=model.max_positions)
    return reference_logits(model, random_tensors(drawn, dtype=torch.float64), IDS)


@pytest.mark.parametrize("case", OTHER)
def test_what_changes_the_logits_is_named(case: str) -> None:
    theirs, changes = OTHER[case]
    ours = replace(theirs, **changes)
    assert (logits(ours) - logits(theirs)).abs().max() > 1e-4
    found = differences(ours, theirs)
    assert found and all(" in the run file and " in line for line in found)
    assert differences(theirs, ours)


@pytest.mark.parametrize("case", SAME)
def test_what_changes_no_logits_is_not(case: str) -> None:
    theirs, changes = SAME[case]
    ours = replace(theirs, **changes)
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-8
    assert differences(ours, theirs) == differences(theirs, ours) == []


def test_all_differences_are_named_at_once_with_both_values() -> None:
    ours = replace(
        MODEL, rope_theta=5e5, norm_epsilon=1e-6, mup=MupConfig(), bias=True, activation="gelu", qkv_bias=True
    )
    assert differences(ours, replace(MODEL, normalization="layernorm")) == [
        "model.normalization is 'rmsnorm' in the run file and 'layernorm' in the checkpoint",
        "model.activation is 'gelu' in the run file and 'swiglu' in the checkpoint",
        "model.bias is True in the run file and False in the checkpoint",
        "model.qkv_bias is True in the run file and False in the checkpoint",
        "model.norm_epsilon is 1e-06 in the run file and 1e-05 in the checkpoint",
        "model.rope_theta is 500000.0 in the run file and 10000.0 in the checkpoint",
        "the factor on the logits (model.output_mult over muP's width factor) is 2.0 in the run file and 1.0 in the "
        "checkpoint",
    ]


def test_the_number_of_learned_positions_is_part_of_a_model() -> None:
    (line,) = differences(replace(LEARNED, max_positions=40), LEARNED)
    assert line == "model.max_positions is 40 in the run file and 30 in the checkpoint"


def test_adapters_are_added_but_not_dropped_or_changed() -> None:
    adapted = replace(MODEL, lora=LoraConfig(rank=2, targets=["qkv", "fc1"]))
    assert differences(adapted, MODEL) == []
    assert differences(replace(adapted, lora=LoraConfig(rank=2, targets=["fc1", "qkv"])), adapted) == []
    for lora in (None, LoraConfig(rank=2, alpha=4.0, targets=["qkv", "fc1"]), LoraConfig(rank=2, targets=["qkv"])):
        (line,) = differences(replace(MODEL, lora=lora), adapted)
        assert line.startswith("model.lora is ") and "'alpha': 16.0" in line


def test_a_vocabulary_that_is_not_known_is_any() -> None:
    assert (
        differences(replace(MODEL, vocab_size=None), MODEL) == differences(MODEL, replace(MODEL, vocab_size=None)) == []
    )
    assert differences(replace(MODEL, vocab_size=30), MODEL) == [
        "model.vocab_size is 30 in the run file and 31 in the checkpoint"
    ]


def test_a_run_file_states_beside_a_checkpoints_model_what_does_not_change_it() -> None:
    lora = LoraConfig(rank=2)
    assert laid_over(ModelConfig(from_checkpoint=True), MODEL) == (MODEL, [])
    assert laid_over(ModelConfig(lora=lora, matrix_init_std=0.3), MODEL) == (
        replace(MODEL, lora=lora, matrix_init_std=0.3),
        [],
    )
    _, other = laid_over(ModelConfig(hidden_size=64, head_dim=4, rope_theta=2e4), MODEL)
    assert [line.split(" ")[0] for line in other] == ["model.hidden_size", "model.rope_theta", "the"]
