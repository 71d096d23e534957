"""What a rank writes for its launcher is what torchrun reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, error_handler

from flm_megatron.distributed.error_file import ERROR_FILE, read_status, write_error_file


def test_torchrun_reads_the_line_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    write_error_file("no tokenizer", 2)
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file=str(path))
    assert "no tokenizer" in str(failure.message) and failure.timestamp > 0
    assert read_status(path) == 2


def test_what_torch_writes_of_an_exception_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    error_handler.ErrorHandler().record_exception(ValueError("planted"))
    assert read_status(tmp_path / "error.json") == 1


def test_without_torchrun_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ERROR_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    write_error_file("no tokenizer", 2)
    assert not list(tmp_path.iterdir())
