"""The corpus that needs no download."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm_megatron.cli.main import main
from flm_megatron.data.corpus.description import read_description
from flm_megatron.data.corpus.standard_library import build_standard_library, standard_library_documents
from flm_megatron.data.corpus.statistics import unigram_entropy
from flm_megatron.errors import RequestError


def test_the_command_makes_tokenizer_training_and_validation_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """About as much text as asked for, a part of it held out; counts and the unigram entropy are printed."""
    out = tmp_path / "stdlib"
    options = ["--vocab-size", "600", "--max-bytes", "900000"]
    assert main(["data", "stdlib", "--out", str(out), *options]) == 0
    train, validation = (read_description(out / name) for name in ("train", "validation"))
    assert 850_000 < train.text_bytes + validation.text_bytes <= 900_000
    assert 0.01 < validation.text_bytes / train.text_bytes < 0.15
    assert train.vocab_size == 600
    lines = capsys.readouterr().out.splitlines()
    entropy = unigram_entropy(out / "train", out / "validation")
    assert 3 < entropy.nats_per_token < 6.4
    assert lines[-1] == (
        f"unigram entropy of validation: {entropy.nats_per_token:.4f} nats/token, {entropy.bits_per_byte:.4f} bits/byte"
    )
    assert (
        lines[0] == f"{out}/train: {train.tokens:,} tokens, {train.text_bytes:,} bytes, {train.documents:,} documents"
    )
    assert main(["data", "stdlib", "--out", str(out), *options]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stdlib"]


def test_it_is_the_same_every_time(tmp_path: Path) -> None:
    """Twice the same bytes in every file."""
    for name in ("a", "b"):
        build_standard_library(tmp_path / name, vocab_size=500, max_bytes=300_000)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_held_out_files_are_not_trained_on() -> None:
    """No text is in both; without room for any there is one clear line."""
    train, held_out = standard_library_documents(1_000_000)
    assert not set(train) & set(held_out)
    assert any("def " in text for text in train)
    with pytest.raises(RequestError, match="no standard library sources for 10 bytes"):
        standard_library_documents(10)
