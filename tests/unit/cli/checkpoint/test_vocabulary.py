"""A checkpoint's vocabulary and tokenizer are its own: no command cuts the one or takes another for the other."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.checkpoint.described import model_of
from flm_megatron.checkpoint.megatron_legacy.arguments import model_from_arguments
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.tokenizer import open_tokenizer, train_tokenizer
from tests.support.checkpoint_cases import Memory, flm_checkpoint, manifest_of, run_of
from tests.support.prose import prose
from tests.support.reference_model import random_tensors

VOCABULARY = 400
MODEL = ModelConfig(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, a checkpoint of ours trained with one of them, and its exports: as they are, and as others' are."""
    folder = tmp_path_factory.mktemp("vocabulary")
    text = "".join(prose(4))
    own = train_tokenizer([text], folder / "own.model", VOCABULARY)
    train_tokenizer([text[::-1]], folder / "same-size.model", VOCABULARY)
    train_tokenizer([text], folder / "smaller.model", 300)
    manifest = manifest_of(MODEL, run=run_of(MODEL, tokenizer=own.path), tokenizer_sha256=own.fingerprint)
    copy_checkpoint(Memory(random_tensors(MODEL)), folder / "ours", manifest)
    for name, padding in (("hf", 1), ("padded", 64)):
        assert flm_checkpoint("export-hf", folder / "ours", folder / name, "--pad-vocab-to", padding) == 0
    shutil.copytree(folder / "padded", folder / "foreign")
    config = json.loads((folder / "foreign" / "config.json").read_text())
    del config["true_vocab_size"]
    (folder / "foreign" / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that ends with status 2 and writes nothing."""
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and sorted(folder.iterdir()) == before
    return error


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "export-hf": lambda source, out: ["checkpoint", "export-hf", source, out],
    "reshard": lambda source, out: ["checkpoint", "reshard", source, out],
    "verify": lambda source, out: ["checkpoint", "verify", source],
    "inspect": lambda source, out: ["checkpoint", "inspect", source],
    "diff": lambda source, out: ["checkpoint", "diff", source, source],
    "generate": lambda source, out: ["generate", source, "--prompt", "a"],
    "eval": lambda source, out: ["eval", "bpb", source, "--text", f"a={__file__}"],
}


@pytest.mark.parametrize("source", ["ours", "hf", "padded"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_recorded_vocabulary_is_not_cut(
    folder: Path, command: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = COMMANDS[command](folder / source, folder / "out")
    line = refused(folder, capsys, *arguments, "--vocab-size", 77)
    assert "--vocab-size is 77, but" in line and "records a vocabulary of 400" in line


def test_a_recorded_vocabulary_is_not_cut_by_an_import(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(folder, capsys, "checkpoint", "import-hf", folder / "hf", folder / "out", "--vocab-size", 77)
    assert "--vocab-size is 77, but" in line and "records a vocabulary of 400" in line


def test_a_vocabulary_that_is_not_recorded_can_be_given_down_to_the_tokenizers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / "foreign"
    line = refused(folder, capsys, "checkpoint", "import-hf", source, folder / "out", "--vocab-size", 77)
    assert "--vocab-size is 77, but the checkpoint's tokenizer" in line and "has 400 ids" in line
    assert flm_checkpoint("import-hf", source, tmp_path / "out", "--vocab-size", VOCABULARY) == 0
    assert flm_checkpoint("verify", tmp_path / "out", "--vocab-size", VOCABULARY) == 0
    written = open_checkpoint(tmp_path / "out")
    assert model_of(written) == MODEL and written.tensors["output_layer.weight"].shape[0] == VOCABULARY
    assert written.manifest.tokenizer_sha256 == open_tokenizer(folder / "own.model").fingerprint


@pytest.mark.parametrize(("kind", "ids"), [("NullTokenizer", 401), ("SentencePieceTokenizer", 400), (None, 400)])
def test_megatrons_argument_is_the_recorded_vocabulary(kind: str | None, ids: int) -> None:
    arguments = argparse.Namespace(
        num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=400, tokenizer_type=kind, swiglu=True
    )
    assert model_from_arguments(arguments, "here", 77).vocab_size == ids


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ("smaller", "has 300 ids, the model of"),
        ("same-size", "its manifest has fingerprint"),
    ],
)
@pytest.mark.parametrize("command", ["export-hf", "generate", "eval"])
def test_another_tokenizer_is_refused(
    folder: Path, command: str, tokenizer: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = COMMANDS[command](folder / "ours", folder / "out")
    assert words in refused(folder, capsys, *arguments, "--tokenizer", folder / f"{tokenizer}.model")


def test_a_tokenizer_that_is_no_longer_the_checkpoints_is_not_exported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "smaller.model", tmp_path / "tokenizer.model")
    manifest = manifest_of(MODEL, run=run_of(MODEL, tokenizer=str(tmp_path / "tokenizer.model")))
    copy_checkpoint(Memory(random_tensors(MODEL)), tmp_path / "ours", manifest)
    assert flm_checkpoint("export-hf", tmp_path / "ours", tmp_path / "out") == 0
    assert "no tokenizer files were written: tokenizer" in (said := capsys.readouterr().out) and "300 ids" in said
    assert not list((tmp_path / "out").glob("tokenizer*"))
