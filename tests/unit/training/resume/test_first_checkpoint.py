"""`checkpoint.initial` is held against the first stage before anything starts, or gives it its model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.logical import EXP_AVG, Region
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.run_file import open_run
from flm_megatron.checkpoint.torch_dist.common import COMMON
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.schema import LoraConfig, ModelConfig, MupConfig, RunConfig
from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.tokenizer import train_tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.growth.plan import make_plan
from flm_megatron.launch.preflight import resolve
from flm_megatron.training.resume.first_checkpoint import first_checkpoint
from tests.support.checkpoint_cases import Memory, edited, flm_checkpoint, manifest_of, run_of
from tests.support.growth_cases import growth
from tests.support.prose import prose
from tests.support.reference_model import random_tensors

VOCABULARY = 400
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=40,
    num_attention_heads=12,
    vocab_size=VOCABULARY,
    norm_epsilon=1e-6,
    rope_theta=500000.0,
    input_mult=1.5,
    output_mult=2.0,
    mup=MupConfig(enabled=True, base_hidden_size=24),
)
STATED = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 40, "num_attention_heads": 12, "norm_epsilon": 1e-6,
    "rope_theta": 500000.0, "input_mult": 1.5, "output_mult": 2.0, "mup": {"enabled": True, "base_hidden_size": 24},
}  # fmt: skip
FORMS = ["ours", "teleflm", "llama", "classic", "megatron"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, a dataset, and one model in every form that a checkpoint has."""
    folder = tmp_path_factory.mktemp("initial")
    texts = prose(4)
    own = train_tokenizer(texts, folder / "own.model", VOCABULARY)
    train_tokenizer(["".join(texts)[::-1]], folder / "other.model", VOCABULARY)
    build_dataset(texts, own, folder / "text", workers=1)
    manifest = manifest_of(MODEL, run=run_of(MODEL, tokenizer=own.path), tokenizer_sha256=own.fingerprint)
    copy_checkpoint(Memory(random_tensors(MODEL)), folder / "ours", manifest)
    for flavour in ("teleflm", "llama"):
        assert flm_checkpoint("export-hf", folder / "ours", folder / flavour, "--flavour", flavour) == 0
    assert flm_checkpoint("reshard", folder / "ours", folder / "classic", "--format", "classic") == 0
    as_megatron(folder / "megatron")
    return folder


def as_megatron(path: Path, described: bool = True) -> None:
    """The model as Megatron-LM's `torch_dist`: padded vocabulary, with its arguments or without."""
    state = random_tensors(MODEL)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, 112))
    dcp.save(state, checkpoint_id=path, no_dist=True)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    arguments = argparse.Namespace(
        num_layers=2, hidden_size=48, ffn_hidden_size=40, num_attention_heads=12, normalization="RMSNorm", swiglu=True,
        add_bias_linear=False, norm_epsilon=1e-6, rotary_base=500000, position_embedding_type="rope", input_mult=1.5,
        output_mult=2.0, mup_scale_factor=2.0, padded_vocab_size=512, vocab_size=None,
    )  # fmt: skip
    torch.save({"iteration": 1} | ({"args": arguments} if described else {}), path / COMMON)


def run_file(folder: Path, out: Path, source: str, model: Any, **stage: Any) -> Path:
    """A run file whose first stage has `model` and starts from `source`."""
    document = {
        "output": str(out / "run"),
        "tokenizer": str(folder / "own.model"),
        "data": {"sequence_length": 32, "train": [{"path": str(folder / "text")}]},
        "checkpoint": {"initial": str(folder / source)},
        "stages": [{"name": "first", "tokens": 512, "model": model, **stage}],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.yaml").write_text(yaml.safe_dump(document))
    return out / "run.yaml"


def refusal(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> str:
    """The one line of a run that is refused before it leaves anything behind."""
    assert main(["train", str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["run.yaml"]
    return error


def folded(source: str) -> ModelConfig:
    """The model as `source` says it: plain Llama has the multipliers in its weights."""
    return replace(MODEL, input_mult=1.0, output_mult=1.0, mup=MupConfig()) if source == "llama" else MODEL


@pytest.mark.parametrize("source", FORMS)
def test_the_checkpoints_model_is_taken_from_any_form(folder: Path, tmp_path: Path, source: str) -> None:
    taken = resolve(open_run(run_file(folder, tmp_path, source, "from_checkpoint"))).stages[0].model
    assert taken == folded(source)
    checkpoint = first_checkpoint(RunConfig(), taken, folder / source)
    assert checkpoint.tensors["output_layer.weight"].shape == (VOCABULARY, 48)


@pytest.mark.parametrize("source", FORMS)
def test_every_difference_is_named_before_anything_starts(
    folder: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = STATED | {"num_attention_heads": 6, "position": "xpos", "rope_theta": 1e4, "norm_epsilon": 1e-5}
    wrong |= {"output_mult": 4.0, "input_mult": 3.0}
    line = refusal(capsys, run_file(folder, tmp_path, source, wrong))
    model = folded(source)
    for words in (
        "model.num_attention_heads is 6 in the run file and 12 in the checkpoint",
        "model.head_dim is 8 in the run file and 4 in the checkpoint",
        "model.position is 'xpos' in the run file and 'rope' in the checkpoint",
        "model.rope_theta is 10000.0 in the run file and 500000.0 in the checkpoint",
        "model.norm_epsilon is 1e-05 in the run file and 1e-06 in the checkpoint",
        f"model.input_mult is 3.0 in the run file and {model.input_mult} in the checkpoint",
        f"muP's width factor) is 2.0 in the run file and {model.logit_multiplier} in the checkpoint",
        "or take its model with `model: from_checkpoint`",
    ):
        assert words in line


def test_the_same_function_said_otherwise_is_the_same(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = STATED | {"head_dim": 4, "num_query_groups": 12, "vocab_size": VOCABULARY, "matrix_init_std": 0.5}
    resolve(open_run(run_file(folder, tmp_path, "ours", said)))
    assert not caplog.messages
    resolve(open_run(run_file(folder, tmp_path, "ours", said | {"mup": {"enabled": False}, "output_mult": 1.0})))
    (line,) = caplog.messages
    assert "m is 1 in the run file and 2 in the checkpoint" in line and "learning rates follow the run file" in line


def test_of_a_checkpoint_that_says_nothing_shapes_are_all_there_is(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    as_megatron(tmp_path / "bare", described=False)
    path = run_file(folder, tmp_path / "a", str(tmp_path / "bare"), STATED | {"rope_theta": 1e4})
    caplog.clear()
    resolve(open_run(path))
    (line,) = caplog.messages
    assert "does not say what model it is of; only names and shapes of its tensors were compared" in line
    assert "is (2, 80, 48), but the first stage's model needs (2, 84, 48)" in refusal(
        capsys, path, "--stages.0.model.ffn_hidden_size", "42"
    )
    taking = run_file(folder, tmp_path / "b", str(tmp_path / "bare"), "from_checkpoint")
    assert "does not say what model it is of: state it in the run file" in refusal(capsys, taking)


def test_moments_that_cannot_be_gone_on_from_are_refused_before_anything_starts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = random_tensors(MODEL)
    stateless = edited(manifest_of(MODEL), optimizer_step=None)
    copy_checkpoint(
        Memory(values | {EXP_AVG + name: value for name, value in values.items()}), tmp_path / "a", stateless
    )
    path = run_file(folder, tmp_path / "b", str(tmp_path / "a"), STATED)
    assert "has Adam's moments but does not say after how many steps" in refusal(capsys, path)
    assert flm_checkpoint("reshard", tmp_path / "a", tmp_path / "weights", "--no-optimizer") == 0
    resolve(open_run(path, ["--checkpoint.initial", str(tmp_path / "weights")]))


def test_tensors_of_another_kind_of_block_are_not_left_out(tmp_path: Path) -> None:
    biased = replace(MODEL, bias=True)
    copy_checkpoint(Memory(random_tensors(biased)), tmp_path / "biased", Manifest(position=StagePosition(1)))
    with pytest.raises(RequestError, match=r"has a tensor decoder\.layers\.self_attention\.linear_qkv\.bias, which"):
        first_checkpoint(RunConfig(), MODEL, tmp_path / "biased")
    first_checkpoint(RunConfig(), biased, tmp_path / "biased")
    normed = replace(MODEL, query_key_norm=True)
    copy_checkpoint(Memory(random_tensors(normed)), tmp_path / "normed", Manifest(position=StagePosition(1)))
    with pytest.raises(RequestError, match=r"has a tensor decoder\.layers\.self_attention\.q_layernorm\.weight, which"):
        first_checkpoint(RunConfig(), MODEL, tmp_path / "normed")


def test_an_untied_head_begins_as_the_embedding_that_a_tied_one_is(tmp_path: Path) -> None:
    tied = replace(MODEL, tie_embeddings=True)
    tensors = random_tensors(tied)
    copy_checkpoint(Memory(tensors), tmp_path / "tied", manifest_of(tied))
    embedding = tensors["embedding.word_embeddings.weight"]
    assert "output_layer.weight" not in first_checkpoint(RunConfig(), tied, tmp_path / "tied").tensors
    checkpoint = first_checkpoint(RunConfig(), MODEL, tmp_path / "tied")
    rows = Region((3, 0), (5, 48))
    assert torch.equal(checkpoint.read("output_layer.weight", rows), embedding[3:8])
    copy_checkpoint(Memory(random_tensors(MODEL)), tmp_path / "untied", Manifest(position=StagePosition(1)))
    with pytest.raises(RequestError, match=r"has a tensor output_layer\.weight, which the first stage's model has not"):
        first_checkpoint(RunConfig(), tied, tmp_path / "untied")


def test_adapters_are_not_dropped_on_the_way(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted = replace(MODEL, lora=LoraConfig(rank=2, targets=["qkv"]))
    copy_checkpoint(Memory(random_tensors(adapted)), tmp_path / "adapted", manifest_of(adapted))
    path = run_file(folder, tmp_path / "a", str(tmp_path / "adapted"), STATED)
    assert "model.lora is None in the run file and {'rank': 2" in refusal(capsys, path)
    path = run_file(folder, tmp_path / "b", str(tmp_path / "adapted"), "from_checkpoint")
    assert open_run(path).stages[0].model.lora == adapted.lora


def grown_out_of_model(path: Path, step: int, operator: str) -> ModelConfig:
    """Save a checkpoint of a stage that grew out of MODEL, at a step of it; returns its true model."""
    wider = replace(MODEL, hidden_size=64, num_attention_heads=16)
    plan = make_plan(MODEL, wider, growth(operator), seed=1, stage="small")
    manifest = manifest_of(wider, step=step, growth={"plan": plan.to_json()})  # as earlier versions wrote it
    copy_checkpoint(Memory(random_tensors(plan.new)), path, manifest)
    return plan.new


def test_a_derived_epsilon_is_the_checkpoints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = grown_out_of_model(tmp_path / "grown", 0, "zero")
    assert new.norm_epsilon == 1e-6 * 48 / 64
    stated = STATED | {"hidden_size": 64, "num_attention_heads": 16}
    path = run_file(folder, tmp_path / "a", str(tmp_path / "grown"), stated)
    assert "model.norm_epsilon is 1e-06 in the run file and 7.5e-07 in the checkpoint" in refusal(capsys, path)
    taken = resolve(open_run(run_file(folder, tmp_path / "b", str(tmp_path / "grown"), "from_checkpoint")))
    assert taken.stages[0].model == new


def test_a_half_open_mask_is_not_started_from(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown_out_of_model(tmp_path / "half", 2, "mask")
    path = run_file(folder, tmp_path / "a", str(tmp_path / "half"), "from_checkpoint")
    assert "was saved while its growth masks were open to 0.5" in refusal(capsys, path)
    grown_out_of_model(tmp_path / "open", 4, "mask")
    resolve(open_run(run_file(folder, tmp_path / "b", str(tmp_path / "open"), "from_checkpoint")))


def test_another_tokenizer_of_the_same_size_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train_tokenizer(["".join(prose(4))[::-1]], tmp_path / "other" / "tokenizer.model", VOCABULARY)
    build_dataset(prose(2), other, tmp_path / "other" / "text", workers=1)
    path = run_file(folder, tmp_path / "a", "ours", STATED)
    line = refusal(capsys, path, "--tokenizer", other.path, "--data.train.0.path", str(tmp_path / "other" / "text"))
    assert "is not the one that" in line and "its manifest has fingerprint" in line


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another size": (lambda run: run["stages"][0].update(model={"from_checkpoint": True, "hidden_size": 64}),
                     "model.hidden_size is 64 in the run file and 48 in the checkpoint"),
    "no checkpoint": (lambda run: run["checkpoint"].update(initial=None), "checkpoint.initial is not set"),
    "not there": (lambda run: run["checkpoint"].update(initial="/nowhere"), "/nowhere is not a checkpoint"),
    "a typing error": (lambda run: run["stages"][0].update(model="from_chekpoint"), "'from_chekpoint' does not fit"),
    "a growth": (lambda run: run["stages"].append({"name": "b", "model": "from_checkpoint", "growth": {}}),
                 "stage 'b' grows, so its model is not that of checkpoint.initial"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_taken_is_refused(
    folder: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = WRONG[case]
    path = run_file(folder, tmp_path, "ours", "from_checkpoint")
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document))
    assert words in refusal(capsys, path)


def test_it_goes_with_presets_defaults_and_overrides(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(folder, tmp_path, "ours", "from_checkpoint", preset="tele-flm-52b")
    document = yaml.safe_load(path.read_text())
    del document["stages"][0]["tokens"]
    document["stages"].append({"name": "second", "tokens": 512})
    document["defaults"] = {"model": "from_checkpoint"}
    path.write_text(yaml.safe_dump(document))
    lora = "{from_checkpoint: true, lora: {rank: 2}}"
    run = open_run(path, ["--stages.second.model", lora])
    assert [stage.model for stage in run.stages] == [MODEL, replace(MODEL, lora=LoraConfig(rank=2))]
    assert main(["config", str(path), "--field", "stages.0.model.rope_theta"]) == 0
    assert capsys.readouterr().out == "500000.0\n"
    assert main(["train", str(path), "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["stages"][0]["model"]
    assert (printed["rope_theta"], printed["from_checkpoint"]) == (500000.0, False)


def test_the_manifests_model_is_what_is_compared(folder: Path) -> None:
    assert recorded_model(open_checkpoint(folder / "ours")) == MODEL
