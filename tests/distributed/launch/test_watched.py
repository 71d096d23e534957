"""`flm train --watch` in a real terminal: the view of a real run, what it prints, how it ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import flm, make_data, make_run

COMMAND = [sys.executable, "-m", "flm_megatron.cli.main", "train"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def watched(source: Path, stop_at: bytes | None = None, *overrides: str) -> tuple[int, str]:
    """Exit status and what the terminal got; with `stop_at` the watching process gets SIGTERM when that is shown."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    command = [*COMMAND, str(source), "--watch", *overrides]
    text = b""
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:
                break
            text += chunk
            if stop_at is not None and stop_at in text:
                process.send_signal(signal.SIGTERM)
                stop_at = None
    os.close(ours)
    return process.returncode, text.decode()


@pytest.mark.slow
def test_a_run_is_watched_to_its_end(data: Path, tmp_path: Path) -> None:
    source, run = make_run(data, tmp_path / "run")
    status, text = watched(source)
    assert status == 0
    assert "finished" in text and "step 8/8" in text  # of the view
    assert "trained to the end of its budget" in text and "small step 8/8 | tokens" not in text
    assert "small step 8/8 | tokens" in (Path(run.output) / "log.txt").read_text()


@pytest.mark.slow
def test_a_signal_to_what_watches_stops_the_run_after_saving(data: Path, tmp_path: Path) -> None:
    source, run = make_run(data, tmp_path / "run", "--stages.0.tokens", "1000000")
    status, text = watched(source, b"(1 of 1), step ")
    assert status == 3 and "stopped by a signal" in text
    assert list((Path(run.output) / "checkpoints" / "small").glob("step_*"))


@pytest.mark.slow
def test_a_mistake_is_said_and_its_status_kept(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path / "run")
    status, text = watched(source, None, "--data.train.0.path", str(tmp_path / "gone"))
    assert status == 2 and "gone" in text


def test_a_branch_or_a_launched_run_is_not_watched(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = make_run(data, tmp_path / "run")
    done = flm("train", source, "--watch", "--branch", "decay@1K")
    assert done.returncode == 2 and "flm status" in done.stderr
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    done = flm("train", source, "--watch")
    assert done.returncode == 2 and "without a launcher" in done.stderr
