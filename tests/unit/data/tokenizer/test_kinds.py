"""`tokenizer.json` and tiktoken files: the ids of the libraries that they are for, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_fingerprint, tokenizer_in
from flm_megatron.errors import DamagedError, RequestError
from tests.support import data_cases
from tests.support.tokenizer_cases import END, PATTERN, START, TORTURE, TURN, hugging_face, ranks, tiktoken_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json` with its configuration."""
    found = tmp_path_factory.mktemp("hugging-face")
    hugging_face(found)
    return found


def transformers_tokenizer(folder: Path) -> Any:
    """What `transformers` makes of the folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TORTURE)
def test_ids_are_those_of_transformers(folder: Path, text: str) -> None:
    ours, theirs = open_tokenizer(folder), transformers_tokenizer(folder)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode_rendered(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text


def test_special_ids_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = open_tokenizer(folder / "tokenizer.json"), transformers_tokenizer(folder)
    assert (ours.eod, ours.bos, ours.pad) == (theirs.eos_token_id, -1, -1)
    assert ours.vocab_size == len(theirs) and ours.chat_template == theirs.chat_template
    assert ours.special_tokens == {name: theirs.convert_tokens_to_ids(name) for name in (END, START, TURN)}
    assert ours.decode([ours.eod, *ours.encode("the"), ours.eod]) == "the"


@pytest.mark.parametrize("text", TORTURE)
def test_ids_are_those_of_tiktoken(tmp_path: Path, text: str) -> None:
    ours = open_tokenizer(tiktoken_file(tmp_path))
    special = {END: 300, START: 301, TURN: 302}
    theirs = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens=special)
    assert ours.encode(text) == theirs.encode(text, disallowed_special=())
    assert ours.encode_rendered(text) == theirs.encode(text, allowed_special="all")
    assert ours.decode([ours.eod, *ours.encode(text)]) == text
    assert (ours.vocab_size, ours.eod, ours.bos, ours.pad) == (theirs.n_vocab, 300, -1, -1)


@pytest.mark.parametrize("letter", [" ", "x", "\n", "日"])
def test_very_long_runs_do_not_overflow_the_stack_of_tiktoken(tmp_path: Path, letter: str) -> None:
    ours = open_tokenizer(tiktoken_file(tmp_path))
    theirs = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})
    text = "a " + letter * 90_000 + " the end"
    assert ours.encode(text) == theirs.encode_ordinary(text)  # as long as the library can
    text = "the " + letter * 600_000 + " the"
    assert ours.decode(ours.encode(text)) == text


def test_ids_that_no_token_has_give_nothing(folder: Path, tmp_path: Path) -> None:
    """As of the rows that only fill up a published model's embedding."""
    for tokenizer in (open_tokenizer(folder), open_tokenizer(tiktoken_file(tmp_path)), data_cases.tokenizer(tmp_path)):
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 7]
        assert tokenizer.decode([*tokenizer.encode("the end"), *beyond]) == "the end"


def test_a_folder_stands_for_the_tokenizer_in_it(folder: Path, tmp_path: Path) -> None:
    assert tokenizer_in(folder) == folder / "tokenizer.json"
    assert tokenizer_fingerprint(folder) == open_tokenizer(folder).fingerprint
    file = tiktoken_file(tmp_path)
    assert tokenizer_in(tmp_path) == file
    data_cases.tokenizer(tmp_path)  # written under a name that is not looked for
    assert open_tokenizer(tmp_path).kind == "tiktoken"


@pytest.mark.parametrize(
    ("beside", "eos"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": TURN}}}, TURN),
        ({"special_tokens_map.json": {"eos_token": START}}, START),
        ({"generation_config.json": {"eos_token_id": [2, 0]}}, TURN),
        ({"config.json": {"eos_token_id": 1}}, START),
        ({"tokenizer_config.json": {"eos_token": TURN}, "generation_config.json": {"eos_token_id": 0}}, TURN),
        ({}, END),
    ],
)
def test_the_end_of_a_document_stands_in_the_files_beside(tmp_path: Path, beside: dict[str, Any], eos: str) -> None:
    hugging_face(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = open_tokenizer(tmp_path)
    assert found.eod == found.special_tokens[eos]


def without_end(path: Path) -> None:
    """A `tokenizer.json` whose special tokens have names of their own."""
    hugging_face(path, eos=None)
    text = (path / "tokenizer.json").read_text().replace(END, "<|stop here|>")
    (path / "tokenizer.json").write_text(text)


def cut(path: Path) -> None:
    """Half a `tokenizer.json`."""
    hugging_face(path)
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text[: len(text) // 2])


def other_json(path: Path) -> None:
    """JSON of something else."""
    (path / "tokenizer.json").write_text('{"a": 1}')


def torn_config(path: Path) -> None:
    """A whole tokenizer with a configuration that is no JSON."""
    hugging_face(path)
    (path / "tokenizer_config.json").write_text("{")


def torn_ranks(path: Path) -> None:
    """A rank file with a line that is none."""
    file = tiktoken_file(path)
    file.write_bytes(file.read_bytes() + b"AAA x\n")


def unnamed_end(path: Path) -> None:
    """A description whose end is not among its special tokens."""
    file = tiktoken_file(path)
    file.with_name("small.tiktoken.json").write_text(json.dumps({"pattern": PATTERN, "special_tokens": {START: 300}}))


def taken_id(path: Path) -> None:
    """A special token with the id of another token."""
    file = tiktoken_file(path)
    file.with_name("small.tiktoken.json").write_text(json.dumps({"pattern": PATTERN, "special_tokens": {END: 65}}))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (without_end, RequestError, "does not say which token ends a document: write it into"),
        (cut, DamagedError, "is not a tokenizer.json that `tokenizers` reads"),
        (other_json, DamagedError, "is not a tokenizer.json that `tokenizers` reads"),
        (torn_config, DamagedError, "tokenizer_config.json is not JSON: "),
        (lambda path: tiktoken_file(path, described=False), RequestError, "a tiktoken rank file, which holds neither"),
        (torn_ranks, DamagedError, "is not a tiktoken rank file"),
        (unnamed_end, RequestError, "which is not among its special_tokens"),
        (taken_id, RequestError, "special token 65 has the id of a token of"),
        (lambda path: None, RequestError, "the folder holds neither tokenizer.json"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(
    tmp_path: Path, make: Any, kind: type[Exception], words: str
) -> None:
    make(tmp_path)
    with pytest.raises(kind) as said:
        open_tokenizer(tmp_path)
    assert words in str(said.value) and "\n" not in str(said.value)


def test_kinds_follow_from_content_not_from_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    opened: Tokenizer = open_tokenizer(tmp_path / "tokenizer.model")
    assert opened.kind == "hugging_face"
