"""Slurm scripts whose ranks run in a container: what stands before the ranks' command, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.launch.test_cluster import launch, printed, run_file

__all__ = ["run_file"]
SLURM = ["--on", "slurm", "--nodes", "4", "--processes-per-node", "4"]


def test_pyxis_gets_options_of_srun(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--container", "pyxis", "--image", "registry#flm:1", "--mounts", f"/shared,{run_file.parent},/a:/b:ro"]
    text = printed(capsys, str(run_file), *SLURM, *options)
    (step,) = [part for part in text.split("\n\n") if "\nsrun " in part]
    assert "--container-image=registry#flm:1 --no-container-mount-home" in step
    mounts = f"$PWD:$PWD,/shared:/shared,{run_file.parent}:{run_file.parent},/a:/b:ro"
    assert f'--container-mounts="{mounts}"' in step
    assert step.index("--container-mounts") < step.index("bash -c")


def test_apptainer_stands_before_the_ranks(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run_file.parent / "flm.sif"
    image.touch()
    options = ["--container", "apptainer", "--image", str(image), "--mounts", f"/shared,{run_file.parent}"]
    text = printed(capsys, str(run_file), *SLURM, *options)
    assert f'apptainer exec --nv --bind "$PWD:$PWD,/shared:/shared,{run_file.parent}:{run_file.parent}"' in text
    assert f'--pwd "$PWD" {image} bash -c' in text
    assert "--nv" not in printed(capsys, str(run_file), *SLURM, *options, "--device", "cpu")


def test_without_a_container_nothing_is_said_of_one(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, str(run_file), *SLURM)
    assert "srun --kill-on-bad-exit=0 --wait=300 bash -c" in text and "--container" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--container", "pyxis", "--image", "/none.sqsh"], "--image /none.sqsh is not there"),
        (["--container", "apptainer", "--image", "none.sif"], "--image none.sif is not there"),
        (["--container", "pyxis", "--mounts", "shared"], "--mounts has 'shared': give /FOLDER"),
        (["--container", "pyxis", "--mounts", "/a:/b:/c"], "--mounts has '/a:/b:/c'"),
        (["--container", "pyxis", "--mounts", "/$HOME"], "--mounts has '/$HOME'"),
        (["--container", "pyxis"], "output /shared/run is not in the container: add its folder to --mounts"),
        (["--container", "pyxis", "--mounts", "/shared:/elsewhere"], "output /shared/run is not in the container"),
        (["--container", "pyxis", "--mounts", "/shared", "--tokenizer", "/t/t.model"], "such as /t"),
        (["--container", "pyxis", "--mounts", "/shared"], "is not in the container"),
        (["--mounts", "/shared"], "--mounts /shared is for a container"),
        (["--container", "pyxis", "--on", "torchrun", "--stage", "one"], "--container pyxis is for --on slurm"),
        (["--container", "podman"], "invalid choice: 'podman'"),
    ],
)
def test_what_would_stay_outside_is_one_line(
    run_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    status, text, errors = launch(capsys, str(run_file), *SLURM, *options)
    assert (status, text) == (2, "")
    assert words in errors and len(errors.strip().splitlines()) == 1


def test_urls_need_no_mount(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--container", "pyxis", "--mounts", f"/shared,{run_file.parent}", "--tokenizer", "s3://bucket/t.model"]
    assert "--container-image" in printed(capsys, str(run_file), *SLURM, *options)
