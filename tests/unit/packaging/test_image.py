"""The Dockerfile: what its stages copy, install and check; the one without GPUs, step by step in place of a build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flm_megatron.engine.version import SUPPORTED
from tests.support import REPOSITORY

TEXT = (REPOSITORY / "Dockerfile").read_text()
STAGES = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", TEXT, re.MULTILINE | re.DOTALL))


def commands(stage: str, word: str) -> list[str]:
    """The arguments of a stage's COPY or RUN lines, without comments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", STAGES[stage], flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{word} (.*)$", text, re.MULTILINE)


def test_every_engine_has_its_command() -> None:
    releases = set(re.findall(r"ENGINE=([\d.]+)", TEXT))
    assert releases == {SUPPORTED["0.16"]}
    pins = dict(
        re.findall(r"^megatron-core==(\S+); python_version (\S+) ", (REPOSITORY / "constraints.txt").read_text(), re.M)
    )
    assert set(pins) == set(SUPPORTED.values())
    assert re.search(r"^ARG PYTHON=3.12$", TEXT, re.M) and "--build-arg PYTHON=3.11" in TEXT


def test_what_is_copied_is_there() -> None:
    for stage in STAGES:
        for line in commands(stage, "COPY"):
            *sources, _ = line.split()
            assert all((REPOSITORY / source).exists() for source in sources), line


@pytest.mark.parametrize(
    ("there", "torch", "status"),
    [
        (["transformer_engine", "triton"], "2.12.0a0", 0),
        (["transformer_engine", "triton", "apex"], "2.9.1", 0),
        (["triton"], "2.12.0a0", 1),
        (["transformer_engine", "triton"], "2.7.0a0", 1),
    ],
)
def test_a_base_that_does_not_fit_stops_the_build(tmp_path: Path, there: list[str], torch: str, status: int) -> None:
    for name in there:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / f"torch-{torch}.dist-info").mkdir()
    (tmp_path / f"torch-{torch}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {torch}\n")
    check = commands("cuda", "RUN")[0].replace("python ", f"{sys.executable} -S ", 1)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(["sh", "-c", check], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("Apex is there" in done.stdout) == ("apex" in there)


@pytest.mark.slow
def test_the_steps_of_the_image_without_gpus(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    folder = tmp_path / "flm-megatron"
    folder.mkdir()
    for line in commands("cpu", "COPY"):
        *sources, target = line.split()
        for source in sources:
            if (REPOSITORY / source).is_dir():
                shutil.copytree(REPOSITORY / source, folder / target)
            else:
                shutil.copy(REPOSITORY / source, folder / target)
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    for line in commands("cpu", "RUN"):
        # PyTorch's own index may not be within reach; the pinned version is.
        step = re.sub(r"--extra-index-url \S+ ", "", line)
        done = subprocess.run(["sh", "-c", step], cwd=folder, env={**os.environ, "PATH": path}, check=False)
        assert done.returncode == 0, step
    shown = subprocess.run(
        ["flm", "--help"], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, check=False
    )
    assert shown.returncode == 0 and b"train" in shown.stdout
