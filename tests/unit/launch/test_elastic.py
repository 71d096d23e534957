"""Under `launch.elastic` a rank that fails is one line: its own, or one that says how it was ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAYS = "from flm_megatron.cli.main import main; import sys; sys.exit(main(['config', '/nowhere/run.yaml']))"
FIRST_RANK_IS_LATE = f"import os, time; time.sleep(0 if os.environ['RANK'] == '1' else 3); {SAYS}"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
ENDS = "import os; os._exit(7)"


@pytest.mark.parametrize(
    ("script", "status", "line"),
    [
        (SAYS, 2, "flm config: /nowhere/run.yaml: cannot be read (No such file or directory)"),
        (FIRST_RANK_IS_LATE, 2, "flm config: /nowhere/run.yaml: cannot be read (No such file or directory)"),
        (DIES, 1, "was killed by SIGKILL"),
        (ENDS, 1, "ended with status 7"),
    ],
    ids=[
        "a mistake that all ranks make",
        "and the first rank last",
        "a rank that is killed",
        "a rank that ends without a word",
    ],
)
def test_two_ranks_that_fail_are_one_line(tmp_path: Path, script: str, status: int, line: str) -> None:
    (tmp_path / "rank.py").write_text(script)
    command = [sys.executable, "-m", "flm_megatron.launch.elastic", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*command, str(tmp_path / "rank.py")], capture_output=True, text=True, timeout=60)
    assert result.returncode == status
    assert line in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_script_of_an_earlier_version_starts_the_same_program(tmp_path: Path) -> None:
    """`flm launch` wrote this name before there was a room for launching."""
    (tmp_path / "rank.py").write_text(ENDS)
    command = [sys.executable, "-m", "flm_megatron.training.elastic", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*command, str(tmp_path / "rank.py")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "ended with status 7" in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
