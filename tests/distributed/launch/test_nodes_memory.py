"""Hosts are lost for real, and the run goes on from what their neighbours kept in memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.training.metrics.events import MetricsEvent, read_events
from tests.distributed.launch.test_nodes import logs, ranks_on, runs
from tests.support.hosts import Host, hosts, obstacle, start_agent, start_job, wait_all
from tests.support.layouts import relative_difference
from tests.support.runs import losses, make_run, wait_for_step

REASON = obstacle()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LIMIT_S = 150
STEPS, INTERVAL = 40, 3
OPTIONS = (
    *("--stages.0.parallel.tensor", "1"),
    *("--stages.0.parallel.distributed_optimizer", "true"),
    *("--stages.0.global_batch", "12"),
    *("--stages.0.tokens", str(STEPS * 12 * 32)),
    *("--checkpoint.memory.interval_steps", str(INTERVAL)),
)
SAVED = ("--checkpoint.interval_steps", "8")  # from step 9 to 15 memory is ahead of the disk
GOES_ON = re.compile(r"small goes on from step (\d+), kept in the memory of (.*)")


def uninterrupted(data: Path, output: Path, ranks: int) -> Path:
    """The output of an uninterrupted run."""
    _, run = make_run(data, output, *OPTIONS, "--distributed.processes", str(ranks))
    assert train(resolve(run)) == 0
    return output


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run of three ranks."""
    return uninterrupted(data, tmp_path_factory.mktemp("whole"), 3)


def lose(host: Host) -> None:
    """All processes end at once, agent and launcher among them, and nothing is heard from the host any more."""
    pids = host.pids()
    host.kill(pids)
    # Until their connections are closed, and that is known to the others, who need not wait for the heartbeat then.
    assert wait_for(lambda: not any(map(runs, pids)))
    host.cut_off()


def last_step(output: Path) -> int:
    return max(event.step for event in read_events(output, MetricsEvent))


def nothing_is_left(machines: list[Host]) -> bool:
    """Whether all processes on the hosts end soon, the agents too."""
    return wait_for(lambda: not any(host.pids() for host in machines))


def wait_for(true: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Wait a little for something to become true; whether it did."""
    deadline = time.monotonic() + timeout_s
    while not (done := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_lost_host_is_replaced_and_the_run_goes_on_from_its_neighbours_memory(
    data: Path, tmp_path: Path, count: int
) -> None:
    """Nothing is on the disk, so there is no other way."""
    source, _ = make_run(data, tmp_path, *OPTIONS)
    command = ["train", str(source)]
    with hosts(count + 1) as machines:
        *used, spare = machines
        job = start_job(used, command, tmp_path, restarts=3)
        wait_for_step(tmp_path, 3 * INTERVAL + 1, job[0], LIMIT_S)
        lose(used[-1])
        lost_at = last_step(tmp_path)
        job[-1] = start_agent(used, spare, command, tmp_path, restarts=3)
        assert wait_all(job, LIMIT_S) == [0] * count, logs(tmp_path)
        assert nothing_is_left(machines)
        names = [host.name for host in used[:-1]]
    said = GOES_ON.search((tmp_path / f"{names[0]}.log").read_text())
    assert said is not None, logs(tmp_path)
    step, kept_on = said.groups()
    assert kept_on == ", ".join(names), logs(tmp_path)
    assert 0 <= lost_at - int(step) < 2 * INTERVAL
    assert losses(tmp_path) == losses(uninterrupted(data, tmp_path / "whole", count))


@pytest.mark.slow
def test_two_neighbours_lost_mean_the_disk(data: Path, whole: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, *OPTIONS, *SAVED)
    command = ["train", str(source)]
    with hosts(5) as machines:
        used, spares = machines[:3], machines[3:]
        job = start_job(used, command, tmp_path, restarts=3)
        wait_for_step(tmp_path, 3 * INTERVAL + 1, job[0], LIMIT_S)
        for host in used[1:]:
            lose(host)
        job[1:] = [start_agent(used, spare, command, tmp_path, restarts=3) for spare in spares]
        assert wait_all(job, LIMIT_S) == [0, 0, 0], logs(tmp_path)
        assert nothing_is_left(machines)
        said = (tmp_path / f"{used[0].name}.log").read_text()
    assert re.search(r"step \d+ of small was kept in memory, but of 1 of 3 ranks \(1\) no copy is left", said)
    assert "going on from the disk" in said and not GOES_ON.search(said)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_the_hosts_that_are_left_go_on_from_memory_under_a_smaller_layout(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    source, _ = make_run(data, tmp_path, *OPTIONS)
    with hosts(3) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path, restarts=3, nodes="2:3")
        wait_for_step(tmp_path, 3 * INTERVAL + 1, job[0], LIMIT_S)
        lose(machines[2])
        assert wait_all(job[:2], 2 * LIMIT_S) == [0, 0], logs(tmp_path)
        said = (tmp_path / f"{machines[0].name}.log").read_text()
    assert GOES_ON.search(said), said
    ours, theirs = ([line[2:] for line in losses(output)] for output in (tmp_path, whole))
    assert len(ours) == len(theirs) and relative_difference(ours, theirs) <= 1e-5


@pytest.mark.slow
def test_ranks_that_die_come_back_from_their_own_hosts_memory(data: Path, whole: Path, tmp_path: Path) -> None:
    """Also on a single host: the agent outlives them."""
    source, _ = make_run(data, tmp_path, *OPTIONS)
    with hosts(1) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path, ranks=3, restarts=1)
        wait_for_step(tmp_path, 2 * INTERVAL + 1, job[0], LIMIT_S)
        machines[0].kill(ranks_on(machines[0])[1:2])
        assert wait_all(job, LIMIT_S) == [0], logs(tmp_path)
        assert nothing_is_left(machines)
    assert GOES_ON.search(logs(tmp_path)), logs(tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_too_small_a_budget_is_one_line_on_every_host_before_the_first_step(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, *OPTIONS, "--checkpoint.memory.budget_gib", "0.0001")
    with hosts(2) as machines:
        job = start_job(machines, ["train", str(source)], tmp_path)
        assert wait_all(job, LIMIT_S) == [2, 2], logs(tmp_path)
        assert nothing_is_left(machines)
        names = [host.name for host in machines]
    for name in names:
        said = (tmp_path / f"{name}.log").read_text()
        assert f"GiB on host {names[0]}, but checkpoint.memory.budget_gib is 0.0001" in said
    assert not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path)
