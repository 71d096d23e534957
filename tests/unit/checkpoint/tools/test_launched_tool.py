"""The tool by its path under `torchrun`, and what happens when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.distributed.launched import launched_processes
from flm_megatron.errors import RequestError
from tests.support import REPOSITORY
from tests.support.checkpoint_cases import flm_checkpoint, write_small

TOOL = str(REPOSITORY / "tools/reshard_checkpoint.py")


@pytest.mark.slow
def test_torchrun_shares_the_work_by_path(tmp_path: Path) -> None:
    write_small(tmp_path / "source")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713", TOOL]
    subprocess.run([*command, str(tmp_path / "source"), str(tmp_path / "out")], check=True, timeout=300)
    source, out = open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "out")
    assert source.manifest.logical_hash == out.manifest.logical_hash
    assert {file.name for file in (tmp_path / "out").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_under_the_final_name_and_can_be_repeated(tmp_path: Path) -> None:
    write_small(tmp_path / "source")
    for kill in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, TOOL, str(tmp_path / "source"), str(tmp_path / "out")])
        while process.poll() is None and not list(tmp_path.glob("out~*.partial")):
            time.sleep(0.001)
        os.kill(process.pid, kill)
        process.wait(timeout=60)
        assert process.returncode != 0, "it was stopped before its end"
        assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("out~*.partial"))
    assert flm_checkpoint("reshard", tmp_path / "source", tmp_path / "out") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_processes_that_cannot_find_each_other_are_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "MASTER_ADDR": "somewhere"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(RequestError, match="4 processes were started, but MASTER_PORT is not set"),
        launched_processes(),
    ):
        pass
