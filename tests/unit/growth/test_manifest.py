"""What `flm grow` says of the checkpoint that it writes is what every other command then believes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.described import model_of
from flm_megatron.checkpoint.files.manifest import MANIFEST, manifest_text
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.stage_manifest import manifest_model
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.loader import load_run, run_to_dict
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.tokenizer import open_tokenizer, train_tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.evaluated import open_evaluated
from tests.support.checkpoint_cases import Memory, flm_checkpoint
from tests.support.evaluation_cases import reference_model
from tests.support.prose import prose
from tests.support.reference_model import random_tensors, reference_logits

VOCABULARY = 400
IDS = torch.arange(40).view(2, 20) * 7 % VOCABULARY
RUN = """
output: {folder}/run
tokenizer: {folder}/tokenizer.model
data: {{sequence_length: 32}}
stages:
  - name: small
    model: &small {{num_layers: 2, hidden_size: 24, ffn_hidden_size: 40, num_attention_heads: 4, norm_epsilon: 1.0e-2}}
    tokens: 1024
  - name: big
    model: {{<<: *small, num_layers: 3, hidden_size: 36, ffn_hidden_size: 56, num_attention_heads: 6}}
    tokens: 1024
    growth: {{hidden: zero, ffn: zero, heads: zero, layers: zero, layer_selection: interleave}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a run file that leaves the vocabulary to it, random weights in `small`, and these grown in `big`."""
    folder = tmp_path_factory.mktemp("grown")
    train_tokenizer(prose(4), folder / "tokenizer.model", VOCABULARY)
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    copy_checkpoint(Memory(random_tensors(old_model(folder))), folder / "small", small_manifest(folder))
    assert grow(folder, folder / "big") == 0
    return folder


def grow(folder: Path, out: Path, *options: str) -> int:
    """Exit status of `flm grow`."""
    return main(
        ["grow", str(folder / "small"), str(folder / "run.yaml"), "--stage", "big", "--out", str(out), *options]
    )


def old_model(folder: Path) -> ModelConfig:
    """The first stage's model."""
    return replace(load_run(folder / "run.yaml").stages[0].model, vocab_size=VOCABULARY)


def small_manifest(folder: Path) -> Manifest:
    """The manifest of the first stage at its end, as a run that took its vocabulary from the tokenizer has it."""
    run = load_run(folder / "run.yaml", ["--stages.0.model.vocab_size", str(VOCABULARY)])
    known = {"step": 8, "tokens": 1024, "samples": 32, "optimizer_step": 8}
    return Manifest.from_json({"run": run_to_dict(run), "stage": "small", **known})


def test_a_vocabulary_that_the_tokenizer_gave_is_in_the_manifest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_checkpoint(folder / "big").manifest
    assert [stage.model["vocab_size"] for stage in manifest.run.stages] == [VOCABULARY, VOCABULARY]
    assert manifest.tokenizer_sha256 == open_tokenizer(folder / "tokenizer.model").fingerprint
    assert flm_checkpoint("verify", folder / "big") == 0
    assert "sizes and checksums of" in capsys.readouterr().out
    evaluated = open_evaluated(folder / "big")  # what `flm eval` and `flm generate` start with
    assert evaluated.model.vocab_size == evaluated.tokenizer.vocab_size == VOCABULARY


def test_transformers_computes_the_small_models_logits_from_the_grown_export(folder: Path) -> None:
    assert flm_checkpoint("export-hf", folder / "big", folder / "llama", "--flavour", "llama") == 0
    with torch.no_grad():
        found = reference_model(folder)(IDS).logits.double()
    old = old_model(folder)
    values = {name: value.double() for name, value in random_tensors(old).items()}
    expected = reference_logits(old, values, IDS)
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_manifests_that_name_the_configured_model_of_a_stage_that_grew_are_read_right(
    folder: Path, tmp_path: Path
) -> None:
    manifest = json.loads((folder / "big" / MANIFEST).read_text())
    configured = replace(load_run(folder / "run.yaml").stages[1].model, vocab_size=None)
    manifest["run"]["stages"][1]["model"] |= {"vocab_size": None, "norm_epsilon": configured.norm_epsilon}
    (tmp_path / "old").mkdir()
    for file in (folder / "big").iterdir():
        (tmp_path / "old" / file.name).symlink_to(file)
    (tmp_path / "old" / MANIFEST).unlink()
    (tmp_path / "old" / MANIFEST).write_text(manifest_text(Manifest.from_json(manifest)))
    model = model_of(open_checkpoint(tmp_path / "old"))
    assert model == replace(configured, vocab_size=VOCABULARY, norm_epsilon=1e-2 * 24 / 36)
    assert flm_checkpoint("verify", tmp_path / "old") == 0


def test_a_model_with_unknown_fields_is_of_a_newer_program() -> None:
    manifest = {"stage": "a", "run": {"stages": [{"name": "a", "model": {"num_layers": 2, "experts": 8}}]}}
    with pytest.raises(RequestError, match=r"stage 'a' is not one that this program knows .*experts.*: update it"):
        manifest_model(Manifest.from_json(manifest))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stages.1.model.vocab_size", "77"], "model.vocab_size is 400 in the stage before and 77"),
        (["--stages.0.model.vocab_size", "77"], "stages.0.model.vocab_size is 77"),
        (
            ["--tokenizer", "{folder}/other.model"],
            "other.model has 300 ids, the model of the checkpoint to grow has 400",
        ),
    ],
)
def test_another_vocabulary_is_not_grown_into(
    folder: Path, tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (folder / "other.model").exists():
        train_tokenizer(prose(4), folder / "other.model", 300)
    assert grow(folder, tmp_path / "out", *(option.format(folder=folder) for option in options)) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
