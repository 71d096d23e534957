"""Documents out of files, and one clear line for each kind of bad file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flm_megatron.data.corpus.corpus import Corpus
from flm_megatron.errors import RequestError


def _documents(*inputs: Path, field: str = "text") -> list[str]:
    return list(Corpus(inputs, field).documents())


def test_a_text_file_is_one_document_exactly(tmp_path: Path) -> None:
    """Line ends are not changed."""
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\n\né".encode())
    assert _documents(tmp_path / "a.txt") == ["one\r\ntwo\n\né"]


def test_json_lines_give_the_field_of_each_line(tmp_path: Path) -> None:
    """Blank lines are not documents; the field can be chosen."""
    lines = [{"text": "a\nb", "body": "x"}, {"text": "é", "body": "y"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert _documents(tmp_path / "a.jsonl") == ["a\nb", "é"]
    assert _documents(tmp_path / "a.jsonl", field="body") == ["x", "y"]


def test_a_tree_gives_its_sources_in_sorted_order(tmp_path: Path) -> None:
    """Other suffixes and empty files are left out."""
    for name, text in {"b.py": "B", "a/z.md": "Z", "a/skip.bin": "no", "c/__init__.py": "", "a/a.py": "A"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert _documents(tmp_path) == ["A", "Z", "B"]
    assert list(Corpus([tmp_path], suffixes=[".bin"]).documents()) == ["no"]
    assert Corpus([tmp_path]).size_bytes() == 3


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    """An empty input is named."""
    (tmp_path / name).touch()
    with pytest.raises(RequestError, match=f"{name} is empty"):
        _documents(tmp_path / name)


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    """In text and, counted from the start of the file, in JSON lines."""
    (tmp_path / "a.txt").write_bytes(b"ab\xffcd")
    with pytest.raises(RequestError, match=r"a\.txt is not UTF-8: byte 0xff at offset 2"):
        _documents(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(RequestError, match=r"a\.jsonl is not UTF-8: byte 0xe9 at offset 24"):
        _documents(tmp_path / "a.jsonl")


BAD_LINES = {
    "no field": ('{"body": "x"}', r"line 3 has no field 'text'; its fields are 'body'"),
    "not an object": ("[1]", "line 3 is not a JSON object but list"),
    "not JSON": ("{oops}", "line 3 is not JSON: .* at column 2"),
    "not text": ('{"text": 5}', "line 3: field 'text' is not text but int"),
    "half a pair": (r'{"text": "\ud800"}', "line 3: field 'text' has an escape of half a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path: Path, case: str) -> None:
    """The message gives the line as an editor counts it, on one line."""
    line, message = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(RequestError, match=r"a\.jsonl " + message) as caught:
        _documents(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_missing_inputs(tmp_path: Path) -> None:
    """An input that is not there, and a folder without sources."""
    with pytest.raises(RequestError, match=r"none\.txt is not there"):
        _documents(tmp_path / "none.txt")
    with pytest.raises(RequestError, match=r"has no file that ends in \.py"):
        list(Corpus([tmp_path], suffixes=[".py"]).documents())
