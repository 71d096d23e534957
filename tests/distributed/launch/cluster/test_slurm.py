"""The script that `flm launch --on slurm` makes, under a real Slurm with two nodes: what ends a job, what follows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest

from flm_megatron.config.loader import dump_run
from flm_megatron.config.schema import GrowthConfig
from flm_megatron.training.metrics.events import FILE, StepEvent, read_events
from tests.support.holding_hook import HOLD
from tests.support.runs import SEQUENCE, flm, make_data, make_run
from tests.support.slurm import NODES, Slurm, obstacle, slurm

REASON = obstacle()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
STEPS = 200


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Started once for all tests, which leave it idle."""
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and datasets."""
    return make_data(tmp_path_factory.mktemp("data"))


class Jobs:
    """A run of two stages, each a job on two nodes with a rank each; the first is slow until `let_go`."""

    def __init__(self, cluster: Slurm, data: Path, folder: Path, *options: str) -> None:
        self.cluster, self.folder = cluster, folder
        hooks = ["--hooks", "[tests.support.holding_hook.Holding]"]
        source, run = make_run(data, folder, "--stages.0.tokens", str(STEPS * 4 * SEQUENCE), *hooks)
        small = run.stages[0]
        large = replace(small, name="large", model=replace(small.model, num_layers=3), growth=GrowthConfig())
        source.write_text(dump_run(replace(run, stages=[small, replace(large, tokens=4 * 4 * SEQUENCE)])))
        self.output = Path(run.output)
        (self.output / HOLD).touch()
        printed = flm(
            *("launch", source, "--on", "slurm", "--device", "cpu", "--nodes", "2", "--processes-per-node", "1"),
            *("--grace-s", "90", "--time", "30", *options, "--dry-run"),
        )
        assert printed.returncode == 0, printed.stderr
        (folder / "launch.sh").write_text(printed.stdout)
        submitted = cluster.run("bash", str(folder / "launch.sh"), cwd=folder).splitlines()
        self.small, self.large = (line.split()[3] for line in submitted)

    def state(self, job: str) -> str:
        """What Slurm calls the state of a job."""
        return self.cluster.job(job).get("JobState", "")

    def restarts(self) -> int:
        """How often the first job was queued again."""
        return int(self.cluster.job(self.small)["Restarts"])

    def wait(self, job: str, *states: str) -> None:
        """Wait until a job is in one of the states."""
        self.cluster.wait_until(f"job {job} {' or '.join(states)}", lambda: self.state(job) in states)

    def wait_for_step(self, step: int) -> None:
        """Wait until the first stage has done a step."""
        self.cluster.wait_until(f"step {step}", lambda: max(self.steps("small"), default=0) >= step)

    def wait_until_queued_again(self) -> None:
        """Wait until the first job is in the queue for the second time, where Slurm lets it wait for two minutes."""
        self.cluster.wait_until("queued again", lambda: self.restarts() == 1 and self.state(self.small) == "PENDING")

    def update(self, change: str) -> None:
        """Change the first job, as an operator does."""
        self.cluster.run("scontrol", "update", f"JobId={self.small}", change)

    def steps(self, stage: str) -> list[int]:
        """The steps of a stage in the metrics."""
        if not (self.output / FILE).exists():
            return []
        return [event.step for event in read_events(self.output, StepEvent) if event.stage == stage]

    def log(self, job: str) -> str:
        """What a job has printed, in all its starts."""
        return (self.folder / f"test-{job}.log").read_text()

    def let_go(self) -> None:
        """Train at full speed from now on."""
        (self.output / HOLD).unlink()

    def wait_for_the_end(self) -> None:
        """Wait until both stages are done: every step once, the second stage after the first."""
        self.wait(self.small, "COMPLETED")
        self.wait(self.large, "COMPLETED")
        assert self.steps("small") == list(range(1, STEPS + 1))
        assert self.steps("large") == [1, 2, 3, 4]


def test_a_job_at_its_time_limit_saves_and_goes_on_under_its_number(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    jobs = Jobs(cluster, data, tmp_path)
    jobs.wait_for_step(3)
    jobs.update("TimeLimit=2")
    jobs.wait_until_queued_again()
    assert (jobs.state(jobs.large), cluster.job(jobs.large)["Reason"]) == ("PENDING", "Dependency")
    saved = jobs.steps("small")[-1]
    assert saved < STEPS
    jobs.update("TimeLimit=30")
    jobs.let_go()
    jobs.wait_for_the_end()
    assert f"step_{saved:08}" in jobs.log(jobs.small)


def test_a_preempted_job_saves_and_goes_on_after_the_other(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    jobs = Jobs(cluster, data, tmp_path)
    jobs.wait_for_step(3)
    other = cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 1"),
    ).strip()
    jobs.wait_until_queued_again()
    jobs.let_go()
    jobs.wait(other, "COMPLETED")
    jobs.wait_for_the_end()


def test_a_job_whose_node_is_lost_goes_on_from_its_last_checkpoint(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    jobs = Jobs(cluster, data, tmp_path)
    jobs.wait_for_step(12)
    cluster.lose(NODES[1])
    jobs.wait_until_queued_again()
    cluster.start(NODES[1])
    jobs.let_go()
    jobs.wait_for_the_end()


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    jobs = Jobs(cluster, data, tmp_path)
    jobs.wait_for_step(3)
    cluster.run("scancel", jobs.small)
    jobs.wait(jobs.small, "CANCELLED")
    cluster.wait_until("the later stage dropped", lambda: jobs.state(jobs.large) in ("CANCELLED", ""))
    cluster.wait_until("the line of the ranks", lambda: "stopped by a signal" in jobs.log(jobs.small))
    assert f"step_{jobs.steps('small')[-1]:08}" in jobs.log(jobs.small)
    assert jobs.restarts() == 0


def test_a_wrong_request_is_not_tried_again(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    lost = tmp_path / "data"
    copytree(data, lost)
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    jobs = Jobs(cluster, lost, tmp_path / "run")
    rmtree(lost)
    cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    jobs.wait(jobs.small, "FAILED")
    assert (cluster.job(jobs.small)["ExitCode"], jobs.restarts()) == ("2:0", 0)
    assert f"flm train: tokenizer {lost}" in jobs.log(jobs.small)


def test_ranks_run_in_a_container(cluster: Slurm, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/sh\necho "$1 $2 $3 $6" >> {tmp_path}/asked\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    image = tmp_path / "flm.sif"
    image.touch()
    mounts = f"{data},{tmp_path}"
    jobs = Jobs(cluster, data, tmp_path, "--container", "apptainer", "--image", str(image), "--mounts", mounts)
    jobs.let_go()
    jobs.wait_for_the_end()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 4  # two stages on two nodes
    own = ",".join(f"{each}:{each}" for each in (tmp_path, data, tmp_path))
    assert set(asked) == {f"exec --bind {own} {image}"}
