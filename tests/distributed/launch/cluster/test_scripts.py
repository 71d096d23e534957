"""The scripts and the manifest's command that `flm launch` makes, run on hosts in network namespaces."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.hosts import CARD, hosts, obstacle, wait_all
from tests.support.runs import flm, losses, make_data, make_run

REASON = obstacle()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_the_torchrun_script_trains_on_two_hosts(tmp_path: Path, rendezvous: str) -> None:
    source, _ = make_run(make_data(tmp_path / "data"), tmp_path, "--stages.0.tokens", "256")
    options = ["--on", "torchrun", "--device", "cpu", "--nodes", "2", "--processes-per-node", "1", "--interface", CARD]
    printed = flm("launch", source, *options, "--rendezvous", rendezvous, "--dry-run")
    script = tmp_path / "launch.sh"
    script.write_text(printed.stdout)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with hosts(2) as machines:
        job = [
            host.start(
                ["bash", str(script)],
                tmp_path / f"{host.name}.log",
                HEAD_NODE=machines[0].name,
                NODE_RANK=str(number),
                PATH=path,
            )
            for number, host in enumerate(machines)
        ]
        statuses = wait_all(job, 150)
        logs = "\n".join((tmp_path / f"{host.name}.log").read_text() for host in machines)
    assert statuses == [0, 0], logs
    assert [line[1] for line in losses(tmp_path)] == [1, 2]


def test_the_pods_of_a_job_set_meet(tmp_path: Path) -> None:
    source, _ = make_run(make_data(tmp_path / "data"), tmp_path, "--stages.0.tokens", "256")
    options = ["--on", "kubernetes", "--api", "jobset", "--device", "cpu", "--nodes", "2", "--processes-per-node", "1"]
    manifest = yaml.safe_load(flm("launch", source, *options, "--dry-run").stdout)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with hosts(2) as machines:
        # Kubernetes gives the first pod this name, and every pod its number.
        assert "test-node-0-0.test:" in command[-1]
        command[-1] = command[-1].replace("test-node-0-0.test", machines[0].name)
        job = [
            host.start(command, tmp_path / f"{host.name}.log", JOB_COMPLETION_INDEX=str(number), PATH=path)
            for number, host in enumerate(machines)
        ]
        statuses = wait_all(job, 150)
        logs = "\n".join((tmp_path / f"{host.name}.log").read_text() for host in machines)
    assert statuses == [0, 0], logs
    assert [line[1] for line in losses(tmp_path)] == [1, 2]
