"""A published-like model: a `tokenizer.json`, and an embedding of more rows than it has ids; through every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.schema import ModelConfig
from tests.support.checkpoint_cases import Memory, flm_checkpoint, manifest_of, run_of
from tests.support.reference_model import random_tensors
from tests.support.tokenizer_cases import QWEN, TURN, hugging_face

MODEL = ModelConfig(num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, vocab_size=512)
TEXT = "the sum of two numbers\r\n\tis <|im_end|> 日本 " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint `ours`, `hf` as exported from it, `back` as imported from there."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = hugging_face(folder / "tokenizer", QWEN, TURN)
    run = run_of(MODEL, tokenizer=str(folder / "tokenizer"))
    manifest = manifest_of(MODEL, run=run, tokenizer_sha256=tokenizer.fingerprint)
    copy_checkpoint(Memory(random_tensors(MODEL)), folder / "ours", manifest)
    assert flm_checkpoint("export-hf", folder / "ours", folder / "hf", "--flavour", "llama") == 0
    assert flm_checkpoint("import-hf", folder / "hf", folder / "back") == 0
    return folder


def test_the_exported_folder_is_what_transformers_expects(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    theirs, config = AutoTokenizer.from_pretrained(folder / "hf"), AutoConfig.from_pretrained(folder / "hf")
    assert theirs.eos_token_id == config.eos_token_id and config.vocab_size == 512 and len(theirs) == 400
    assert (folder / "hf" / "tokenizer.json").read_bytes() == (folder / "tokenizer" / "tokenizer.json").read_bytes()


def test_the_imported_checkpoint_names_its_tokenizer(folder: Path) -> None:
    manifest = open_checkpoint(folder / "back").manifest
    assert manifest.run.tokenizer == str(folder / "hf" / "tokenizer.json")
    assert manifest.tokenizer_sha256 == open_checkpoint(folder / "ours").manifest.tokenizer_sha256


@pytest.mark.slow
def test_all_of_them_are_evaluated_and_write_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "text.txt").write_bytes(TEXT.encode())
    bits, written = [], []
    for name in ("ours", "hf", "back"):
        arguments = ["eval", "bpb", str(folder / name), "--text", f"a={folder / 'text.txt'}", "--window", "16"]
        assert main([*arguments, "--json", str(folder / f"{name}.json")]) == 0
        domain = json.loads((folder / f"{name}.json").read_text())["checkpoints"][0]["domains"]["a"]
        assert domain["bytes"] == len(TEXT.encode())
        bits.append(domain["bits_per_byte"])
        capsys.readouterr()
        assert main(["generate", str(folder / name), "--prompt", "the", "--max-new-tokens", "24", "--json"]) == 0
        written.append(json.loads(capsys.readouterr().out))
    assert bits == pytest.approx([bits[0]] * 3, rel=1e-6)
    assert written[0] == written[1] == written[2]
    assert written[0]["completion"] and "\ufffd" not in written[0]["prompt"]
