"""Training of every kind in both forms: lossless, the same each time, and read alike by the libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from flm_megatron.cli.main import main
from flm_megatron.data.tokenizer import open_tokenizer, train_tokenizer
from flm_megatron.data.tokenizer.train import TrainedKind
from flm_megatron.errors import RequestError
from tests.support.prose import prose
from tests.support.tokenizer_cases import TORTURE

NAMES = ["<unk><s></s><pad>", "<0x41> <0xFF>", "<|begin_of_text|><|end_of_text|><|pad|>", "a </s> b"]
FORMS: list[tuple[TrainedKind, str]] = [("bpe", "model"), ("bpe", "json"), ("unigram", "model"), ("unigram", "json")]
TEXTS = [*prose(30), "</s> <0x0A> once"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND.model and KIND.json of every kind."""
    found = tmp_path_factory.mktemp("trained")
    for kind, form in FORMS:
        train_tokenizer(TEXTS, found / f"{kind}.{form}", 420, kind=kind)
    for form in ("model", "json"):
        train_tokenizer([], found / f"bytes.{form}", kind="bytes")
    return found


@pytest.mark.parametrize("form", ["model", "json"])
@pytest.mark.parametrize(("kind", "ids"), [("bpe", 420), ("unigram", 420), ("bytes", None)])
def test_every_text_comes_back(folder: Path, kind: str, form: str, ids: int | None) -> None:
    found = open_tokenizer(folder / f"{kind}.{form}")
    assert found.vocab_size == (ids or {"model": 260, "json": 259}[form])
    assert len({found.eod, found.bos, found.pad}) == 3 and min(found.eod, found.bos, found.pad) >= 0
    for text in [*TORTURE, *NAMES, *TEXTS[:2]]:
        encoded = found.encode(text)
        assert found.gives_back(text), text
        assert not {found.eod, found.bos, found.pad} & set(encoded), text  # names in a text are text
        assert kind != "bytes" or len(encoded) == len(text.encode())
    assert kind == "bytes" or len(found.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # it learnt something


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_the_libraries_read_them_alike(folder: Path, kind: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{kind}.model"))
    library = tokenizers.Tokenizer.from_file(str(folder / f"{kind}.json"))
    library.encode_special_tokens = True
    for text in [*TORTURE, *TEXTS[:2]]:
        assert open_tokenizer(folder / f"{kind}.json").encode(text) == library.encode(text).ids
        if "\u2581" not in text:  # which SentencePiece writes as a space
            assert open_tokenizer(folder / f"{kind}.model").encode(text) == processor.encode(text)


def test_both_forms_of_unigram_cut_text_alike(folder: Path) -> None:
    one, other = open_tokenizer(folder / "unigram.model"), open_tokenizer(folder / "unigram.json")
    assert all(one.encode(text) == other.encode(text) for text in TEXTS)


def test_the_same_text_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    """In another process too, where hashes are salted otherwise."""
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    script = (
        "import json, sys; from flm_megatron.data.tokenizer import train_tokenizer\n"
        "for name in sys.argv[2:]: train_tokenizer(json.load(open('texts.json')), name, 420, kind=name.split('.')[0])"
    )
    names = [f"{kind}.{form}" for kind, form in FORMS]
    subprocess.run([sys.executable, "-c", script, "texts.json", *names], check=True, cwd=tmp_path)
    assert [(tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names] == [True] * 4


@pytest.mark.parametrize(
    ("out", "ids", "kind", "words"),
    [
        ("x.json", 9000, "bpe", "9000 ids is too large for this text: give at most "),
        ("x.json", 259, "bpe", "259 ids is too small: 259 are special tokens and bytes"),
        ("x.json", 9000, "unigram", "9000 ids is too large for this text: give at most "),
        ("x.json", 262, "unigram", "262 ids is too small for this text's characters"),
        ("x.json", 300, "bytes", "one of bytes has its size"),
        ("x.tiktoken", 300, "bpe", "tiktoken files are read, not written"),
        ("x.json", 300, "words", "'words' is not one of bpe, unigram, bytes"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, out: str, ids: int, kind: TrainedKind, words: str) -> None:
    with pytest.raises(RequestError) as said:
        train_tokenizer(TEXTS, tmp_path / out, ids, kind=kind)
    assert words in str(said.value) and "\n" not in str(said.value)
    assert not list(tmp_path.iterdir())


def test_the_command_line_trains_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(" ".join(TEXTS))
    command = ["data", "tokenizer", "--out", str(tmp_path / "b.json"), "--kind", "bytes"]
    assert main([*command, str(tmp_path / "a.txt")]) == 2 and main([*command, "--vocab-size", "300"]) == 2
    assert main(command) == 0
    assert f"259 ids, fingerprint {open_tokenizer(tmp_path / 'b.json').fingerprint}" in capsys.readouterr().out
    command = ["data", "tokenizer", "--out", str(tmp_path / "u.json"), "--kind", "unigram", "--vocab-size", "400"]
    assert main(command) == 2 and "learns from text" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "a.txt")]) == 0
    assert "400 ids" in capsys.readouterr().out
