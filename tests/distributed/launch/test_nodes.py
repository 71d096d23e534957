"""Several nodes for real: hosts in network namespaces, elastic torchrun over gloo, the layout across hosts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from flm_megatron.launch.elastic import main as elastic
from flm_megatron.launch.elastic import status_of
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from tests.support.hosts import Host, hosts, obstacle, start_agent, start_job, wait_all
from tests.support.layouts import relative_difference
from tests.support.runs import losses, make_run, wait_for_step

REASON = obstacle()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LIMIT_S = 150
SLACK_S = 3
"""For a process to end, on a busy machine."""
STEPS = 12
OPTIONS = ("--checkpoint.interval_steps", "2", "--stages.0.tokens", str(STEPS * 128))
ENDLESS = ("--stages.0.tokens", "128000000")
LAYOUT = (
    "--stages.0.parallel.tensor",
    "2",
    "--stages.0.parallel.pipeline",
    "2",
    "--stages.0.parallel.sequence",
    "true",
)


def logs(folder: Path) -> str:
    """What all hosts printed."""
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.log")))


def end_times(pids: list[int], timeout_s: float) -> list[float]:
    """When each process ended, by the monotonic clock; `timeout_s` from now for one that did not.

    On a host that is cut off torchrun waits for the network and does not fetch the statuses of its ranks.
    """
    deadline = time.monotonic() + timeout_s
    ends: dict[int, float] = {}
    while len(ends) < len(pids) and time.monotonic() < deadline:
        ends |= {pid: time.monotonic() for pid in pids if pid not in ends and not runs(pid)}
        time.sleep(0.05)
    return [ends.get(pid, deadline) for pid in pids]


def runs(pid: int) -> bool:
    """Whether a process is there and not merely waiting for its status to be fetched."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def agent_on(host: Host) -> int:
    """Process id of torchrun on a host."""
    found = [psutil.Process(pid) for pid in host.pids()]
    return next(p.pid for p in found if "RANK" not in p.environ() and "train" in p.cmdline())


def ranks_on(host: Host) -> list[int]:
    """Process ids of the ranks on a host: those that torchrun started."""
    found = []
    for pid in host.pids():
        with suppress(psutil.NoSuchProcess):  # it may just have ended
            process = psutil.Process(pid)
            if "RANK" in process.environ() and "train" in process.cmdline():
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run on this machine."""
    output = tmp_path_factory.mktemp("whole")
    _, run = make_run(data, output, *OPTIONS)
    assert train(resolve(run)) == 0
    return output


def test_ranks_killed_on_one_host_come_back_by_themselves(data: Path, whole: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, *OPTIONS)
    with hosts(2) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path, restarts=1)
        wait_for_step(tmp_path, 5, job[0], LIMIT_S)
        killed = ranks_on(machines[1])
        machines[1].kill(killed)
        statuses = wait_all(job, LIMIT_S)
    assert len(killed) == 1 and statuses == [0, 0], logs(tmp_path)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_a_host_cut_off_from_the_network_is_named_in_time(data: Path, tmp_path: Path) -> None:
    timeout_s = 15
    source, _ = make_run(data, tmp_path, *ENDLESS, "--distributed.timeout_s", str(timeout_s))
    with hosts(2) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path)
        wait_for_step(tmp_path, 3, job[0], LIMIT_S)
        machines[1].cut_off()
        began = time.monotonic()
        ends = end_times([ranks_on(host)[0] for host in machines], 2 * timeout_s)
        name, reached = machines[1].name, machines[0].address
    assert max(ends) - began < timeout_s + SLACK_S
    near, far = ((tmp_path / f"{host.name}.log").read_text() for host in machines)
    assert f"rank 0: no sign of life for 12 s from rank 1 on host {name}" in near
    assert f"rank 1: host {name} has not reached the first rank's host ({reached}:" in far


@contextmanager
def waiting_for_a_lost_host(source: Path, output: Path) -> Iterator[tuple[Host, Host, int]]:
    """Two hosts of a run, the second of them lost without a word, and the process of the rank that waits for it."""
    with hosts(2) as machines:
        job = start_job(machines, ["train", str(source)], output)
        wait_for_step(output, 3, job[0], LIMIT_S)
        machines[1].cut_off()  # first, so that no connection is seen to end
        machines[1].kill()
        (waits,) = ranks_on(machines[0])
        yield machines[0], machines[1], waits


def test_who_waits_for_a_lost_host_and_is_told_to_stop_ends_soon(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, *ENDLESS)
    with waiting_for_a_lost_host(source, tmp_path) as (left, lost, waits):
        began = time.monotonic()
        os.kill(waits, signal.SIGTERM)
        (ended,) = end_times([waits], LIMIT_S)
        name = lost.name
    assert ended - began < 10
    assert f"rank 0: told to stop, and rank 1 on host {name} is gone: " in (tmp_path / f"{left.name}.log").read_text()


@pytest.mark.slow
def test_who_waits_for_a_lost_host_ends_although_nobody_tells_it(data: Path, tmp_path: Path) -> None:
    """Long before the heartbeat would miss it: `distributed.timeout_s` is 600."""
    source, _ = make_run(data, tmp_path, *ENDLESS)
    with waiting_for_a_lost_host(source, tmp_path) as (left, lost, waits):
        began = time.monotonic()
        (ended,) = end_times([waits], LIMIT_S)
        name = lost.name
    said = (tmp_path / f"{left.name}.log").read_text()
    assert ended - began < 60, said
    assert f"rank 0: rank 1 on host {name} is gone: ending without saving" in said


@pytest.mark.slow
def test_a_host_that_is_replaced_joins_again(data: Path, whole: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, *OPTIONS)
    with hosts(2) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path, restarts=3)
        wait_for_step(tmp_path, 5, job[0], LIMIT_S)
        machines[1].kill()
        job[1].wait(10)
        job[1] = start_agent(machines, machines[1], ["train", str(source)], tmp_path, restarts=3)
        assert wait_all(job, LIMIT_S) == [0, 0], logs(tmp_path)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_sigterm_on_all_hosts_saves_and_the_requeued_job_goes_on(data: Path, whole: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, *OPTIONS)
    with hosts(2) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path)
        wait_for_step(tmp_path, 3, job[0], LIMIT_S)
        for host in machines:
            os.kill(agent_on(host), signal.SIGTERM)
        assert wait_all(job, LIMIT_S) == [3, 3], logs(tmp_path)
        stopped = losses(tmp_path)[-1][1]
        again = start_job(machines, ["train", str(source)], tmp_path)
        assert wait_all(again, LIMIT_S) == [0, 0], logs(tmp_path)
    assert 3 <= stopped < STEPS
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_a_layout_over_four_hosts_trains_as_one_process_does(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path / "hosts", *LAYOUT)
    with hosts(4) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path)
        assert wait_all(job, 2 * LIMIT_S) == [0] * 4, logs(tmp_path)
    _, run = make_run(data, tmp_path / "one", "--stages.0.parallel.tensor", "1")
    assert train(resolve(run)) == 0
    ours, theirs = ([line[2:] for line in losses(tmp_path / output)] for output in ("hosts", "one"))
    assert relative_difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("status", [0, 2, 3])
def test_the_launcher_ends_with_the_status_of_its_ranks(tmp_path: Path, status: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.exit({status})")
    assert elastic(["--standalone", "--nproc-per-node", "2", str(program)]) == status


@pytest.mark.parametrize(("statuses", "status"), [({3}, 3), ({2}, 2), ({2, 3}, 1), ({1, 3}, 1), (set(), 1), ({-9}, 1)])
def test_ranks_that_do_not_agree_fail(statuses: set[int], status: int) -> None:
    assert status_of(statuses) == status
