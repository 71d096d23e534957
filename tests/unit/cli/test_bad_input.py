"""Whatever is wrong with what was typed: the right exit status, one line on stderr that names it, in time, and nothing
left behind. The rows are in `bad_input`, by command; how many: benchmarks/reliability/bad_input.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flm_megatron.cli.main import main
from tests.unit.cli.bad_input import checkpoints, data, models, more, options, run_files
from tests.unit.cli.bad_input.row import Row, tree
from tests.unit.cli.bad_input.scene import make_scene

ROWS: list[Row] = [*options.ROWS, *run_files.ROWS, *data.ROWS, *checkpoints.ROWS, *models.ROWS, *more.ROWS]
LONGEST_S = 3.0
"""Of computing; of waiting, on a machine that others use too, five times as long."""
IN_PROCESSES = (
    "train",
    "config run.yaml --stages.0.tokens 0",
    "train absent.yaml",
    "train run.yaml --output text.txt/x",
    "train run.yaml --data.train.0.path absent --data.validation.0.path lost",
    "train run.yaml --data.sequence_length 20000 --stages.0.tokens 100000",
    "train run.yaml --distributed.processes 1000",
    "data build bad.jsonl --tokenizer tokenizer.model --out x",
    "data tokenizer text.txt --out t.model --vocab-size 1000000",
    "checkpoint inspect damaged",
    "generate ours --prompt a --out folder",
    "report absent",
)
"""Rows that are also typed for real; the times of these are not held to the limit, for they import what they need."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all is typed."""
    import torch  # noqa: F401  # imported once: no row is to wait for it

    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def unchanged(scene: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The scene as the current folder, which has to be left as it was."""
    monkeypatch.chdir(scene)
    before = tree(scene)
    yield scene
    assert tree(scene) == before


def check_answer(row: Row, status: int, errors: str) -> None:
    """Exit status, number of lines, words."""
    assert status == row.status, errors
    assert row.words in errors
    assert len(errors.splitlines()) == row.lines, errors


@pytest.mark.parametrize("row", ROWS, ids=[row.arguments[:100] for row in ROWS])
def test_bad_input_is_answered_in_one_line(row: Row, unchanged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began, computing = time.monotonic(), time.process_time()
    status = main(row.typed())
    taken_s, computed_s = time.monotonic() - began, time.process_time() - computing
    check_answer(row, status, capsys.readouterr().err)
    assert computed_s < LONGEST_S and taken_s < 5 * LONGEST_S


@pytest.mark.parametrize("arguments", IN_PROCESSES)
def test_the_same_of_the_real_command(arguments: str, unchanged: Path) -> None:
    (row,) = {row for row in ROWS if row.arguments == arguments}
    command = [sys.executable, "-m", "flm_megatron.cli.main", *row.typed()]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    check_answer(row, result.returncode, result.stderr)
    assert result.stdout == ""


def test_a_name_that_cannot_be_printed_does_not_end_what_went_well(unchanged: Path, tmp_path: Path) -> None:
    out = os.path.join(os.fsencode(tmp_path), b"\xff.html")
    command: list[str | bytes] = [sys.executable, "-m", "flm_megatron.cli.main", "report", "runs/done", "--out", out]
    result = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert os.path.exists(out) and result.stdout.endswith(b"\\udcff.html\n")


def test_a_value_that_cannot_be_printed_is_one_line_all_the_same(unchanged: Path) -> None:
    command: list[str | bytes] = [sys.executable, "-m", "flm_megatron.cli.main", "train", b"\xff\nrun\x1b[31m.yaml"]
    result = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        rb"flm train: \udcff\nrun\x1b[31m.yaml: cannot be read (No such file or directory)"
    ]
