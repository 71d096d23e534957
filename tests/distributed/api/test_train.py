"""The program of docs/api.md, run as it stands: it trains, and run again it finds that all is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import flm_megatron as flm
from tests.support import REPOSITORY
from tests.support.api_page import TRAINED, program, write_run_file
from tests.support.runs import losses, make_data


def run_program(folder: Path) -> str:
    """What it prints, started in its folder."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "train.py"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_of_the_page_trains_and_goes_on(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    write_run_file(tmp_path)
    (tmp_path / "train.py").write_text(program())
    assert run_program(tmp_path).splitlines()[-1] == "done"
    trained = losses(tmp_path / "runs/tiny")
    assert len(trained) == 8 and trained[-1][2] < trained[0][2]
    assert flm.verify(tmp_path / TRAINED).problems == []
    assert run_program(tmp_path).splitlines()[-1] == "done" and losses(tmp_path / "runs/tiny") == trained
