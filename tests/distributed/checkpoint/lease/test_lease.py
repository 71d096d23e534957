"""Two runs, one output: the second is told who is there, the first goes on undisturbed; nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flm_megatron.checkpoint.lease import file as lease_file
from flm_megatron.checkpoint.lease.file import LEASE
from flm_megatron.checkpoint.lease.holder import this_process
from flm_megatron.checkpoint.lease.watch import SILENT_RENEWALS
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.training.metrics.events import RestartEvent, read_events
from tests.support.runs import final_hash, flm, flm_process, losses, make_run, start_flm, wait_for_step
from tests.unit.checkpoint.lease.test_lease import renewing

LONG = ("--stages.0.tokens", "3072", "--checkpoint.interval_steps", "4")  # 24 steps
ELSEWHERE = replace(this_process(0.2), host="node007", pid=77, token="other")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    _, run = make_run(data, output, *LONG)
    assert train(resolve(run)) == 0
    assert not (output / LEASE).exists()
    return output


def contents(output: Path) -> dict[str, bytes]:
    """Every file of a run, but for the renewals of its lease."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_a_second_run_on_an_output_leaves_the_first_alone(
    data: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = make_run(data, tmp_path, *LONG)
    first = start_flm("train", source)
    wait_for_step(tmp_path, 6, first)
    everyone = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in everyone:  # so that it is not done before the second comes
        process.suspend()
    (tmp_path.parent / "link").symlink_to(tmp_path)
    began = time.monotonic()
    second = flm("train", source, "--output", str(tmp_path.parent / "link"), "--seed", "7")
    assert second.returncode == 2 and time.monotonic() - began < 30
    assert second.stderr.count("\n") == 1 and f"is in use by process {first.pid} on host" in second.stderr
    assert "seed: 7" not in (tmp_path / "run.yaml").read_text() and first.poll() is None
    for process in everyone:
        process.resume()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert (tmp_path / LEASE).exists()
    third = flm("train", source)  # at once
    assert third.returncode == 0 and "waiting" not in caplog.text, third.stderr
    assert losses(tmp_path) == losses(whole) and final_hash(tmp_path) == final_hash(whole)
    assert read_events(tmp_path, RestartEvent)[0].step >= 4
    assert not list(tmp_path.glob(f"{LEASE}*"))


def test_a_run_of_another_host_is_respected_while_it_renews_its_lease(
    whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, before = whole / "test.yaml", contents(whole)
    with renewing(whole / LEASE, ELSEWHERE):
        refused = flm("train", source, "--seed", "7")
    assert refused.returncode == 2 and "in use by process 77 on host node007" in refused.stderr
    assert contents(whole).keys() - before.keys() == {LEASE} and before.items() <= contents(whole).items()
    again = flm("train", source)
    assert again.returncode == 0 and f"waiting up to {SILENT_RENEWALS * 0.2:g} s" in caplog.text
    assert {**contents(whole), "log.txt": b""} == {**before, "log.txt": b""}  # it says that all is done


def test_ranks_that_a_launcher_started_share_the_lease_of_their_first(whole: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29711"}
    world: dict[str, Any] = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **place}
    arguments = ("train", whole / "test.yaml", "--stages.0.parallel.tensor", "1")
    before = (whole / "run.yaml").read_bytes()
    with renewing(whole / LEASE, ELSEWHERE):
        refused = flm_process(*arguments, **world)
    assert refused.returncode == 2 and "in use by process 77 on host node007" in refused.stderr
    assert (whole / "run.yaml").read_bytes() == before
    again = flm_process(*arguments, **world)
    assert again.returncode == 0, again.stderr
    assert not (whole / LEASE).exists()


def test_ranks_that_slept_while_their_lease_was_taken_over_save_nothing(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, *LONG)
    parent = start_flm("train", source)
    wait_for_step(tmp_path, 1, parent)
    ranks = psutil.Process(parent.pid).children(recursive=True)
    for process in (psutil.Process(parent.pid), *ranks):
        process.suspend()
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("*/step_*"))
    file = tmp_path / LEASE
    judged = file.read_bytes()
    assert lease_file.create(lease_file.claim_of(file, lease_file.holder_line(judged)), ELSEWHERE.to_bytes())
    assert lease_file.take_over(file, judged, ELSEWHERE.to_bytes())
    for process in ranks:  # the holder, which started them, sleeps on
        process.resume()
    deadline = time.monotonic() + 60
    while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks):
        assert time.monotonic() < deadline, "no rank has ended"
        time.sleep(0.05)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*/step_*") if path.is_dir()) == saved
    parent.send_signal(signal.SIGCONT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 1 and "taken over by process 77 on host node007" in errors, errors
    assert lease_file.holds(file, ELSEWHERE.to_bytes())
