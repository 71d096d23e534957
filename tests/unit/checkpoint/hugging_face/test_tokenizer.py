"""Tokenizers in exported folders: what `AutoTokenizer` of transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flm_megatron.checkpoint.hugging_face.tokenizer import SpecialIds, write_tokenizer
from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer
from flm_megatron.errors import RequestError
from tests.support import data_cases
from tests.support.tokenizer_cases import CHATML, END, TORTURE, TURN, hugging_face, tiktoken_file

MESSAGES = [{"role": "user", "content": "the sum of 1 and 2"}, {"role": "assistant", "content": "3"}]


def source_of(kind: str, folder: Path) -> Tokenizer:
    """A tokenizer of a kind in `folder`, with a chat template where one lies beside it."""
    if kind == "sentencepiece":
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(Path(data_cases.tokenizer(folder).path).read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
        return open_tokenizer(folder)
    if kind == "hugging_face":
        return hugging_face(folder)
    return open_tokenizer(tiktoken_file(folder))


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging_face", "tiktoken"])
def test_auto_tokenizer_loads_the_same_ids(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, out = source_of(kind, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    special = write_tokenizer(out, source, 64)
    theirs = AutoTokenizer.from_pretrained(out)
    # SentencePiece's own symbol for a space is written through bytes here, and as a space by transformers.
    texts = [text for text in TORTURE if kind != "sentencepiece" or not ("\u2581" in text or "</s>" in text)]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == source.encode(text), text
    assert special.eos == theirs.eos_token_id == source.eod and theirs.model_max_length == 64
    assert theirs.chat_template == source.chat_template
    again = open_tokenizer(out)  # what `flm checkpoint import-hf` finds there
    assert (again.eod, again.bos, again.pad) == (source.eod, source.bos, source.pad)
    assert kind == "tiktoken" or again.fingerprint == source.fingerprint


def test_what_a_configuration_says_is_kept(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    config |= {"eos_token": TURN, "pad_token": END, "model_max_length": 7, "extra": ["kept"]}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(config))
    source = open_tokenizer(tmp_path / "source")
    assert write_tokenizer(tmp_path, source, 64) == SpecialIds(None, source.special_tokens[TURN], source.pad)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written == config | {"model_max_length": 64, "clean_up_tokenization_spaces": False}


def test_a_pattern_that_is_read_in_another_way_is_not_exported(tmp_path: Path) -> None:
    file = tiktoken_file(tmp_path)
    described = json.loads(file.with_name("small.tiktoken.json").read_text())
    described["pattern"] = r"\p{L}+$|[^\n]|\n"  # the end of a text for tiktoken, of a line for tokenizers
    file.with_name("small.tiktoken.json").write_text(json.dumps(described))
    with pytest.raises(RequestError, match=r"small\.tiktoken: `tokenizers` cuts text by its pattern in another way"):
        write_tokenizer(tmp_path, open_tokenizer(file), 64)
