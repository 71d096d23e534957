"""The tokenizer gives every text back, and its training is bounded and repeatable."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from flm_megatron.data.tokenizer.sentencepiece import CHUNK_CHARACTERS
from flm_megatron.errors import DamagedError, RequestError
from tests.support import data_cases


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer."""
    return data_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back(model: Tokenizer, text: str) -> None:
    """Every UTF-8 text is decoded to itself."""
    assert model.decode(model.encode(text)) == text


SPECIAL = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "\u2581", "\0", "<s>", "</s>", "<unk>", "<0x0A>", "é", "🎉", "the"]
)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(SPECIAL))
def test_whitespace_and_names_of_special_ids_come_back(model: Tokenizer, parts: list[str]) -> None:
    """Runs of spaces, line ends, SentencePiece's own space symbol and the names of special ids are plain text."""
    ids = model.encode("".join(parts))
    assert model.decode(ids) == "".join(parts)
    assert not {0, 1, 2, 3} & set(ids)


def test_long_text_is_encoded_in_chunks_and_comes_back(model: Tokenizer) -> None:
    """A text of several chunks, with and without line ends to cut at."""
    for text in ("the rank é holds\n" * (CHUNK_CHARACTERS // 6), "é" * (2 * CHUNK_CHARACTERS + 1)):
        assert len(text) > 2 * CHUNK_CHARACTERS
        assert model.decode(model.encode(text)) == text


def test_special_ids_and_vocabulary(model: Tokenizer) -> None:
    """Ids 1 to 3 are bos, eos and pad; nothing is added to a text; bytes and pieces are below the vocabulary size."""
    assert (model.bos, model.eod, model.pad, model.vocab_size) == (1, 2, 3, 320)
    assert model.encode("") == []
    assert min(model.encode("zebra ü")) >= 0 and max(model.encode("zebra ü")) < 320


def test_training_is_repeatable_and_the_fingerprint_is_the_file(tmp_path: Path) -> None:
    """The same text gives the same file; another vocabulary another fingerprint."""
    first = train_tokenizer(data_cases.texts(40), tmp_path / "a.model", 320)
    again = train_tokenizer(data_cases.texts(40), tmp_path / "b.model", 320)
    other = train_tokenizer(data_cases.texts(40), tmp_path / "c.model", 310)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model", "c.model"]


def test_training_learns_from_a_bounded_even_sample(tmp_path: Path) -> None:
    """Of two halves in different scripts, a sample of a tenth sees both; a beginning of a tenth only the first."""
    halves = ["tensor layer row sum\n" * 400, "日月 山川 田水 火木\n" * 400] * 10
    ordered = sorted(halves)
    size = sum(len(text.encode()) for text in ordered)
    even = train_tokenizer(ordered, tmp_path / "even.model", 290, text_bytes=size, max_bytes=size // 10)
    start = train_tokenizer(ordered, tmp_path / "start.model", 275, max_bytes=size // 10)
    assert len(even.encode("日月")) < len("日月".encode())
    assert len(start.encode("日月")) == len("日月".encode())


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    """There must be something to learn from."""
    with pytest.raises(RequestError, match="no text"):
        train_tokenizer(texts, tmp_path / "t.model", 320)


def test_a_vocabulary_too_large_for_the_text_is_refused(tmp_path: Path) -> None:
    """The message names the size; no file is left."""
    with pytest.raises(RequestError, match="a vocabulary of 4000 ids is too large for this text: give at most"):
        train_tokenizer(data_cases.texts(2), tmp_path / "t.model", 4000)
    assert not list(tmp_path.iterdir())


def test_an_existing_model_is_not_overwritten(tmp_path: Path) -> None:
    """The file there stays as it is."""
    (tmp_path / "t.model").write_text("mine")
    with pytest.raises(RequestError, match=r"t\.model exists"):
        train_tokenizer(data_cases.texts(40), tmp_path / "t.model", 320)
    assert (tmp_path / "t.model").read_text() == "mine"


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    """Missing and damaged files are told apart."""
    with pytest.raises(RequestError, match="is not there"):
        open_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DamagedError, match=r"bad\.model is not a SentencePiece model"):
        open_tokenizer(tmp_path / "bad.model")
