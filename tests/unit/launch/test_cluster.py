"""What `flm launch` makes of a run file: the processes its layouts need, in the language of each launcher."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flm_megatron.cli.main import main
from flm_megatron.launch.cluster.environment import FABRICS, VARIABLES, environment
from tests.support import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
SCRIPTS = {
    "tiny.torchrun.sh": "tiny.yaml --on torchrun --device cpu --processes-per-node 4",
    "tele-flm-52b.elastic.sh": "tele-flm-52b.yaml --on torchrun --nodes 112 --fabric roce --interface eth0",
    "tele-flm-52b.static.sh": "tele-flm-52b.yaml --on torchrun --nodes 112 --rendezvous static --interface eth0",
    "tele-flm-102b.trainjob.yaml": "tele-flm-102b.yaml --on kubernetes --nodes 112 --fabric roce --interface eth0",
    "tele-flm-52b.jobset.yaml": (
        "tele-flm-52b.yaml --on kubernetes --api jobset --nodes 112 --fabric roce --interface eth0 --queue training"
    ),
    "tele-flm-102b.pytorchjob.yaml": (
        "tele-flm-102b.yaml --on kubernetes --api pytorchjob --nodes 112 --fabric roce --interface eth0"
    ),
    "tele-flm-1t.slurm.sh": "tele-flm-1t.yaml --on slurm --nodes 112 --interface ib0 --grace-s 570",
    "tele-flm.slurm.sh": "tele-flm.yaml --on slurm --nodes 112 --interface ib0 --grace-s 570",
    "tele-flm-102b.pyxis.sh": (
        "tele-flm-102b.yaml --on slurm --nodes 112 --interface ib0 --grace-s 570 --container pyxis "
        "--image registry.example.com#flm-megatron:latest --mounts /scratch"
    ),
    "flm-101b.slurm.sh": "flm-101b.yaml --on slurm --nodes 24 --interface ib0",
}


def launch(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of a dry run."""
    status = main(["launch", *arguments, "--dry-run"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a dry run that succeeds prints."""
    status, text, errors = launch(capsys, *arguments)
    assert status == 0, errors
    return text


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Two stages: one of 2 x 2 ranks in every replica, one with a fixed size of 8."""
    path = tmp_path / "run.yaml"
    path.write_text(
        """
        name: My Run
        output: /shared/run
        data: {sequence_length: 32, train: [{path: /shared/train}]}
        stages:
          - {name: one, tokens: 1000, global_batch: 64, parallel: {tensor: 2, pipeline: 2}}
          - {name: two, tokens: 1000, global_batch: 64, parallel: {tensor: 4, pipeline: 1, data: 2}}
        """
    )
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_are_what_the_command_prints(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    run, *rest = SCRIPTS[name].split()
    assert printed(capsys, f"examples/{run}", *rest) == (EXAMPLES / "launch" / name).read_text()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.endswith(".sh")])
def test_scripts_are_sound_shell(name: str) -> None:
    path = EXAMPLES / "launch" / name
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_elastic_torchrun_starts_as_many_ranks_as_asked(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, str(run_file), "--on", "torchrun", "--nodes", "1", "--processes-per-node", "8", "--stages.1.tokens", "5"
    )
    assert "--nnodes 1 --nproc-per-node 8" in text and "--standalone" in text
    assert f"train {run_file} --stages.1.tokens 5\n" in text
    text = printed(capsys, str(run_file), "--on", "torchrun", "--nodes", "4", "--stage", "one", "--endpoint", "a:1")
    assert "--nnodes 4 --nproc-per-node 8 --max-restarts 10" in text
    assert '--rdzv-backend c10d --rdzv-endpoint "a:1"' in text and "--stage one" in text
    assert "one: tensor 2 x pipeline 2 x data 8" in text and "two:" not in text


def test_static_torchrun_numbers_the_nodes_and_does_not_restart(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "4", "--stage", "one", "--rendezvous", "static"]
    text = printed(capsys, str(run_file), "--on", "torchrun", *options)
    assert '--node-rank "${NODE_RANK:?' in text and "--max-restarts 0" in text and "c10d" not in text


def test_slurm_chains_a_job_of_its_own_size_for_every_stage(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, str(run_file), "--on", "slurm", "--nodes", "4", "--processes-per-node", "4")
    assert re.findall(r"^ +submit (\w+) (\d+)$", text, re.M) == [("one", "4"), ("two", "2")]
    assert "#SBATCH --ntasks-per-node=4" in text and "#SBATCH --gpus-per-node=4" in text
    assert "#SBATCH --signal=B:USR1@150" in text and "TORCH_ELASTIC" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--on", "torchrun", "--nodes", "3", "--processes-per-node", "3"], "9 processes do not divide"),
        (["--on", "torchrun", "--nodes", "4"], "32 processes are not"),
        (["--on", "slurm", "--nodes", "1", "--processes-per-node", "4"], "give --nodes 2"),
        (["--on", "torchrun", "--nodes", "2", "--stage", "one", "--endpoint", "a:b"], "not HOST:PORT"),
        (["--on", "slurm", "--nodes", "0"], "argument --nodes: 0 is below 1"),
        (["--on", "slurm", "--stage", "three"], "the run has one, two"),
        (["--on", "slurm", "--stages.0.global_batch", "7"], "global_batch 7"),
    ],
)
def test_what_does_not_fit_is_one_line(
    run_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    status, text, errors = launch(capsys, str(run_file), *options)
    assert status == 2 and text == ""
    assert words in errors and len(errors.strip().splitlines()) == 1


def test_a_launcher_that_is_not_here_is_named(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    arguments = ["launch", str(run_file), "--on", "slurm", "--nodes", "4", "--output", str(run_file.parent / "out")]
    assert main(arguments) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    assert not (run_file.parent / "out").exists()


def test_every_variable_is_used_by_some_network_and_explained() -> None:
    used = {each.name for fabric in FABRICS for each in environment(True, 2, fabric, "eth0")}
    assert {each.name for each in VARIABLES} <= used
    assert not any(each.network for each in environment(True, 1, "infiniband", "eth0"))
    roce = {each.name for each in environment(True, 2, "roce", None)}
    assert roce - {each.name for each in environment(True, 2, "infiniband", None)} == {
        "NCCL_IB_GID_INDEX",
        "NCCL_IB_TC",
    }
    text = (EXAMPLES.parent / "docs" / "launch.md").read_text()
    assert all(f"`{each.name}`" in text for each in VARIABLES)
