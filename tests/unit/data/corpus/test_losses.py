"""A tokenizer that normalises is named when a dataset is built with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers

from flm_megatron.cli.main import main
from tests.support.tokenizer_cases import hugging_face


def test_a_tokenizer_that_loses_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hugging_face(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}\n{"text": "A\\u030a and more"}\n')
    build = ["data", "build", str(tmp_path / "a.jsonl"), "--tokenizer", str(file), "--workers", "1", "--out"]
    assert main([*build, str(tmp_path / "whole")]) == 0
    assert "WARNING" not in capsys.readouterr().err
    lossy = tokenizers.Tokenizer.from_file(str(file))
    lossy.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    lossy.save(str(file))
    assert main([*build, str(tmp_path / "lossy")]) == 0
    said = capsys.readouterr()
    assert "does not give back 1 of the first 2 documents" in said.err and "becomes '\u00e5 and more'" in said.err
    assert said.out.count("documents") == 1
