"""Completion in a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import flm

BASH = """
source {script}
complete_words() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${{#COMP_LINE}}; COMPREPLY=()
    $(complete -p flm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    printf '%s\\n' "${{COMPREPLY[@]}}"
}}
complete_words {words}
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = flm("completion", "bash")
    assert done.returncode == 0
    (file := tmp_path_factory.mktemp("completion") / "flm.sh").write_text(done.stdout)
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("flm stat", ["status"]),
        ("flm checkpoint ver", ["verify"]),
        ("flm plan run.yaml --gpu", ["--gpu", "--gpus"]),
        ("flm train run.yaml --stages.0.parallel.tens", ["--stages.0.parallel.tensor"]),
        ("flm train ru", ["run.yaml"]),
        ("flm checkpoint reshard a b --format cl", ["classic"]),
    ],
)
def test_bash_completes(script: Path, tmp_path: Path, words: str, found: list[str]) -> None:
    (tmp_path / "run.yaml").write_text("")
    program = BASH.format(script=script, words=words)
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == found


def test_an_unknown_shell_is_one_line() -> None:
    done = flm("completion", "powershell")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
