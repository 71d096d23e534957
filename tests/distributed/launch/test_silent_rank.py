"""A rank that stands still is named, whether or not this machine allows hosts of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.runs import make_data, make_run, wait_for_step

TIMEOUT_S = 15


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    options = ["--stages.0.tokens", "128000000", "--distributed.timeout_s", str(TIMEOUT_S)]
    source, _ = make_run(make_data(tmp_path / "data"), tmp_path, *options)
    command = [sys.executable, "-m", "flm_megatron.launch.elastic", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "flm_megatron.cli.main", "train", str(source)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
    )
    try:
        wait_for_step(tmp_path, 3, process)
        ranks = {each.environ().get("RANK"): each for each in psutil.Process(process.pid).children()}
        ranks["1"].send_signal(signal.SIGSTOP)
        _, errors = process.communicate(timeout=4 * TIMEOUT_S)
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else ():
            child.kill()
        process.kill()
    assert process.returncode == 1
    assert "rank 0: no sign of life for 12 s from rank 1 on host" in errors
