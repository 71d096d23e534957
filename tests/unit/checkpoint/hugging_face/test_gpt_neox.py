"""GPT-NeoX and Pythia against `transformers`, both ways, on random weights of odd shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flm_megatron.checkpoint.hugging_face.config import model_from_config
from flm_megatron.checkpoint.hugging_face.families.registry import FAMILIES, require_expressible
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.run_file import run_file_of_folder
from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.config.schema import ModelConfig, MupConfig, RopeScaling
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import make_plan
from tests.support.checkpoint_cases import Memory
from tests.support.growth_cases import growth
from tests.support.reference_model import IDS, random_tensors, reference_logits

NEOX = ModelConfig(
    num_layers=3, hidden_size=108, ffn_hidden_size=75, num_attention_heads=9, vocab_size=331, norm_epsilon=1e-3,
    rope_theta=500.0, normalization="layernorm", activation="gelu", bias=True, parallel_residual=True,
    rotary_percent=0.35,
)  # fmt: skip
"""4 of 12 channels of a head turn."""
LLAMA3 = RopeScaling("llama3", 3.0, 16)
JSON: dict[str, Any] = {
    "model_type": "gpt_neox", "num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 75,
    "num_attention_heads": 3, "vocab_size": 331,
}  # fmt: skip


def transformers_logits(path: Path) -> torch.Tensor:
    """Logits in fp32 of `transformers`, whose own class for the family it has to be."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    with torch.no_grad():
        return model(IDS).logits.double()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA3, "mup": MupConfig(True, 36)},
        {"activation": "gelu_tanh", "parallel_residual": False, "rotary_percent": 1.0, "tie_embeddings": True},
    ],
    ids=["parallel", "sequential"],
)
def test_transformers_computes_our_logits_from_an_export(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = replace(NEOX, **changes, input_mult=0.5, output_mult=3.0)
    values = random_tensors(model)
    write_hugging_face(Memory(values), model, tmp_path / "out", ExportOptions("gpt_neox", shard_bytes=100_000))
    expected = reference_logits(model, {name: value.double() for name, value in values.items()}, IDS)
    torch.testing.assert_close(transformers_logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def test_what_transformers_wrote_is_read_and_grown_and_read_by_it_again(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rotary = {"rope_type": "llama3", "rope_theta": 500.0, "partial_rotary_factor": 0.35, "factor": 3.0}
    lengths = {"original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = GPTNeoXConfig(
        num_hidden_layers=3, hidden_size=108, intermediate_size=75, num_attention_heads=9, vocab_size=331,
        layer_norm_eps=1e-3, rope_parameters={**rotary, **lengths},
    )  # fmt: skip
    theirs = GPTNeoXForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.1, 0.2, generator=generator)
        expected = theirs(IDS).logits.double()
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = HuggingFaceCheckpoint(tmp_path / "theirs")
    assert checkpoint.config == replace(NEOX, rope_scaling=LLAMA3)
    written = run_file_of_folder(tmp_path / "theirs")["stages"]
    assert isinstance(written, list) and written[0]["model"]["rotary_percent"] == 0.35
    values = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    close = {"rtol": 1e-5, "atol": 1e-5 * expected.std().item()}
    torch.testing.assert_close(reference_logits(checkpoint.config, values, IDS), expected, **close)

    larger = replace(checkpoint.config, num_layers=5, hidden_size=216, ffn_hidden_size=100, num_attention_heads=18)
    plan = make_plan(checkpoint.config, larger, growth("clone", clone_noise=0.2), seed=3)
    write_hugging_face(GrownCheckpoint(checkpoint, plan), plan.new, tmp_path / "grown", ExportOptions("gpt_neox"))
    torch.testing.assert_close(transformers_logits(tmp_path / "grown"), expected, **close)


def test_a_folder_of_an_old_export_is_read(tmp_path: Path) -> None:
    values = random_tensors(NEOX)
    write_hugging_face(Memory(values), NEOX, tmp_path / "new", ExportOptions("gpt_neox"))
    config = json.loads((tmp_path / "new/config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "new/model.safetensors")
    for layer in range(3):
        attention = f"gpt_neox.layers.{layer}.attention."
        stored[f"{attention}bias"] = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        stored[f"{attention}masked_bias"] = torch.tensor(-1e9)
        stored[f"{attention}rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(stored, tmp_path / "old/pytorch_model.bin")
    checkpoint = HuggingFaceCheckpoint(tmp_path / "old")
    assert checkpoint.config == NEOX
    assert all(torch.equal(checkpoint.read(name), value) for name, value in values.items())


def test_what_is_left_out_is_what_transformers_has_for_it() -> None:
    model = model_from_config(JSON, "folder")
    assert (model.rotary_channels, model.rope_theta, model.norm_epsilon) == (8, 10000.0, 1e-5)
    assert model.parallel_residual and model.activation == "gelu"
    old = {"rotary_pct": 0.5, "rotary_emb_base": 500, "hidden_act": "gelu_fast", "use_parallel_residual": False}
    model = model_from_config(JSON | old, "folder")
    assert (model.rotary_channels, model.rope_theta, model.activation) == (16, 500.0, "gelu_tanh")
    assert not model.parallel_residual


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu': only 'gelu', 'gelu_new', "),
        ({"attention_bias": False}, "attention_bias False: only True is supported"),
        ({"layer_norm_eps": 0}, "layer_norm_eps 0: it should be greater than 0"),
        ({"rotary_pct": 0.1}, "rotary_pct 0.1: model.rotary_percent is 0.1, give .* of a head's 32 channels"),
        ({"rotary_pct": 1.5}, "rotary_pct 1.5: it should be less than or equal to 1"),
        ({"rotary_emb_base": "wide"}, "rotary_emb_base 'wide'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1: it should be None"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type 'dynamic'"),
        ({"sliding_window": 8}, "sliding_window 8, which is not supported"),
    ],
)
def test_what_the_family_lacks_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^folder: config.json has {message}"):
        model_from_config(JSON | change, "folder")


def test_heads_that_share_keys_or_have_other_channels_stay_out() -> None:
    family = FAMILIES["gpt_neox"]
    require_expressible(NEOX, family)
    with pytest.raises(RequestError, match=r"num_query_groups = 3 \(here: 9\): no family known here can"):
        require_expressible(replace(NEOX, num_query_groups=3), family)
    with pytest.raises(RequestError, match=r"gpt_neox .* head_dim = 8 \(here: 12\)"):
        require_expressible(replace(NEOX, head_dim=8, rotary_percent=0.5), family)
    with pytest.raises(RequestError, match=r"parallel_residual = True .*: --flavour gpt_neox can"):
        require_expressible(NEOX, FAMILIES["llama"])
