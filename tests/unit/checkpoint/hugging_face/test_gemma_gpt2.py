"""Gemma and GPT-2 against `transformers`, both ways, on random weights of odd shapes."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flm_megatron.checkpoint.hugging_face.config import model_from_config
from flm_megatron.checkpoint.hugging_face.families.registry import FAMILIES, require_expressible
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.run_file import run_file_of_folder
from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.checkpoint.logical import Region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import make_plan
from flm_megatron.model.parameters import FC1, FINAL_NORM
from tests.support.checkpoint_cases import Memory
from tests.support.growth_cases import growth
from tests.support.reference_model import IDS, ODD, random_tensors, reference_logits

GEMMA = replace(ODD, activation="geglu", norm_epsilon=1e-3)
GPT2 = ModelConfig(
    num_layers=3, hidden_size=63, ffn_hidden_size=75, num_attention_heads=7, vocab_size=331, norm_epsilon=1e-3,
    normalization="layernorm", activation="gelu_tanh", bias=True, position="learned", max_positions=21,
)  # fmt: skip
SIZES: dict[str, Any] = {"vocab_size": 331, "initializer_range": 0.1}
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def transformers_logits(path: Path, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits in `dtype` of `transformers`, whose own class for the family it has to be."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    assert type(model).__name__ == name
    with torch.no_grad():
        return model(IDS).logits.double()


def fill(theirs: torch.nn.Module) -> None:
    """Give a model of `transformers` weights that all matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.05, 0.2, generator=generator)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_computes_our_gemma_from_an_export(tmp_path: Path, tied: bool) -> None:
    model = replace(GEMMA, tie_embeddings=tied, input_mult=3.0, output_mult=0.5)
    values = random_tensors(model)
    write_hugging_face(Memory(values), model, tmp_path / "out", ExportOptions("gemma", shard_bytes=100_000))
    expected = reference_logits(model, {name: value.double() for name, value in values.items()}, IDS)
    torch.testing.assert_close(transformers_logits(tmp_path / "out", "GemmaForCausalLM"), expected, **CLOSE)


def test_a_gemma_of_transformers_is_read_and_grown_and_read_by_it_again(tmp_path: Path) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        hidden_size=108, intermediate_size=75, num_hidden_layers=3, num_attention_heads=18, num_key_value_heads=3,
        head_dim=8, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, **SIZES,
    )  # fmt: skip
    theirs = GemmaForCausalLM(config).eval()
    fill(theirs)
    with torch.no_grad():
        expected = theirs(IDS).logits.double()
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = HuggingFaceCheckpoint(tmp_path / "theirs")
    model = checkpoint.config
    assert model == replace(GEMMA, tie_embeddings=True, input_mult=math.sqrt(108))
    values = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    close = {"rtol": 1e-5, "atol": 1e-5 * expected.std().item()}
    torch.testing.assert_close(reference_logits(model, values, IDS), expected, **close)

    larger = replace(model, num_layers=5, hidden_size=216, ffn_hidden_size=100, num_attention_heads=24)
    for name, wanted in (("kept", model.input_mult), ("followed", math.sqrt(216))):
        plan = make_plan(model, replace(larger, input_mult=wanted), growth("clone", clone_noise=0.2), seed=3)
        write_hugging_face(GrownCheckpoint(checkpoint, plan), plan.new, tmp_path / name, ExportOptions("gemma"))
        torch.testing.assert_close(transformers_logits(tmp_path / name, "GemmaForCausalLM"), expected, **close)


def test_small_weights_of_norms_in_bf16_are_not_lost_beside_one(tmp_path: Path) -> None:
    values = {name: value.bfloat16() for name, value in random_tensors(GEMMA).items()}
    values[f"{FINAL_NORM}.weight"] = 1 + torch.linspace(-1e-2, 1e-2, 108).bfloat16().float()
    write_hugging_face(Memory(values), GEMMA, tmp_path / "one", ExportOptions("gemma", dtype=torch.bfloat16))
    read = HuggingFaceCheckpoint(tmp_path / "one")
    norm = read.read(f"{FINAL_NORM}.weight")
    assert norm.dtype is torch.float32 and torch.equal(norm, values[f"{FINAL_NORM}.weight"])
    write_hugging_face(read, read.config, tmp_path / "two", ExportOptions("gemma", dtype=torch.bfloat16))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_what_a_gemma_has_by_default_and_may_not_have() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 75, "num_attention_heads": 16}
    config = {"model_type": "gemma", "vocab_size": 331, **sizes}
    model = model_from_config(config, "folder")
    assert (model.kv_channels, model.query_groups, model.tie_embeddings) == (256, 16, True)
    assert model_from_config(config | {"hidden_act": "gelu"}, "folder") == model
    for name, value in {
        "hidden_act": "silu",
        "hidden_activation": "gelu",
        "attention_bias": True,
        "use_bidirectional_attention": True,
        "final_logit_softcapping": 30.0,
    }.items():
        with pytest.raises(RequestError, match=f"^folder: config.json has {name} "):
            model_from_config(config | {name: value}, "folder")


@pytest.mark.parametrize(
    ("changes", "shard"),
    [({"tie_embeddings": True, "input_mult": 3.0, "output_mult": 0.5}, 20_000), ({"activation": "gelu"}, 10**9)],
    ids=["tied", "untied"],
)
def test_transformers_computes_our_gpt2_from_an_export(
    tmp_path: Path, changes: dict[str, Any], shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flm_megatron.checkpoint.hugging_face.writer.BUFFER_BYTES", 1_000)  # parts of matrices
    model = replace(GPT2, **changes)
    values = random_tensors(model)
    write_hugging_face(Memory(values), model, tmp_path / "out", ExportOptions("gpt2", shard_bytes=shard))
    expected = reference_logits(model, {name: value.double() for name, value in values.items()}, IDS)
    torch.testing.assert_close(transformers_logits(tmp_path / "out", "GPT2LMHeadModel"), expected, **CLOSE)


def test_a_gpt2_of_transformers_is_read_and_grown_and_read_by_it_again(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=63, n_inner=75, n_layer=3, n_head=7, n_positions=21, layer_norm_epsilon=1e-3, **SIZES)
    theirs = GPT2LMHeadModel(config).eval()
    fill(theirs)
    with torch.no_grad():
        expected = theirs(IDS).logits.double()
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = HuggingFaceCheckpoint(tmp_path / "theirs")
    model = checkpoint.config
    assert model == replace(GPT2, tie_embeddings=True)
    written = run_file_of_folder(tmp_path / "theirs")["stages"]
    assert isinstance(written, list) and written[0]["model"]["max_positions"] == 21
    whole = {name: checkpoint.read(name) for name in checkpoint.tensors}
    values = {name: value.double() for name, value in whole.items()}
    close = {"rtol": 1e-5, "atol": 1e-5 * expected.std().item()}
    torch.testing.assert_close(reference_logits(model, values, IDS), expected, **close)
    part = Region((1, 5, 7), (2, 30, 40))
    assert torch.equal(checkpoint.read(f"{FC1}.weight", part), whole[f"{FC1}.weight"][part.slices])

    larger = replace(model, num_layers=5, hidden_size=126, ffn_hidden_size=100, num_attention_heads=14)
    plan = make_plan(model, larger, growth("clone", clone_noise=0.2), seed=3)
    write_hugging_face(GrownCheckpoint(checkpoint, plan), plan.new, tmp_path / "grown", ExportOptions("gpt2"))
    torch.testing.assert_close(transformers_logits(tmp_path / "grown", "GPT2LMHeadModel"), expected, **close)


def test_the_files_of_the_bare_gpt2_and_their_masks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flm_megatron.checkpoint.hugging_face.reader.BUFFER_BYTES", 1_000)  # some rows at a time
    model = replace(GPT2, tie_embeddings=True)
    values = random_tensors(model)
    write_hugging_face(Memory(values), model, tmp_path / "new", ExportOptions("gpt2"))
    stored = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "new/model.safetensors").items()}
    stored |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 21, 21).tril() for layer in range(3)}
    (tmp_path / "old").mkdir()
    shutil.copyfile(tmp_path / "new/config.json", tmp_path / "old/config.json")
    save_file(stored, tmp_path / "old/model.safetensors")
    checkpoint = HuggingFaceCheckpoint(tmp_path / "old")
    assert checkpoint.config == model
    assert all(torch.equal(checkpoint.read(name), value) for name, value in values.items())


def test_what_a_gpt2_has_by_default_and_may_not_have() -> None:
    config = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 331}
    model = model_from_config(config, "folder")
    assert (model.ffn_hidden_size, model.max_positions, model.tie_embeddings) == (192, 1024, True)
    for name, value in {
        "n_head": 5,
        "n_inner": 0,
        "n_positions": 0,
        "activation_function": "relu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "add_cross_attention": True,
    }.items():
        with pytest.raises(RequestError, match=f"^folder: config.json has {name} "):
            model_from_config(config | {name: value}, "folder")
    changes: list[dict[str, Any]] = [{"num_query_groups": 1}, {"head_dim": 8}, {"position": "rope"}, {"bias": False}]
    for change in changes:
        with pytest.raises(RequestError, match=f"gpt2 cannot express the model's {next(iter(change))} = "):
            require_expressible(replace(GPT2, **change), FAMILIES["gpt2"])
