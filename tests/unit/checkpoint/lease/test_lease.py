"""One holder at a time, whoever comes: alive ones are respected, dead ones replaced by exactly one, robbed ones end."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.checkpoint.files.destination import destination
from flm_megatron.checkpoint.lease import file as lease_file
from flm_megatron.checkpoint.lease.holder import Holder, job_of, start_ticks, this_process
from flm_megatron.checkpoint.lease.lease import lease
from flm_megatron.checkpoint.lease.watch import SILENT_RENEWALS
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import FlmError, RequestError

RENEW_S = 0.1
SILENCE_S = SILENT_RENEWALS * RENEW_S
ELSEWHERE = replace(this_process(RENEW_S), host="node007", pid=77, job="Slurm job 5", token="other")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flm_megatron.distributed.preload"])


def held(
    file: Path, patience_s: float = 0.0, lost: Callable[[str], None] | None = None
) -> AbstractContextManager[None]:
    """The lease on a folder `out`."""
    return lease(file, "folder out", "choose another", Processes(), patience_s, lost, RENEW_S)


def leave(file: Path, holder: Holder) -> None:
    """The lease that a holder which is no more has left."""
    assert lease_file.create(file, holder.to_bytes())


@contextmanager
def renewing(file: Path, holder: Holder) -> Iterator[None]:
    """A holder that renews its lease while the block lasts."""
    leave(file, holder)
    over = threading.Event()

    def renew() -> None:
        count = 0
        while not over.wait(RENEW_S):
            count += 1
            lease_file.renew(file, holder.to_bytes(), count)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the lease lies."""
    return tmp_path / ".lease"


def test_a_lease_is_renewed_and_goes_at_the_end_or_after_an_error(file: Path) -> None:
    with held(file):
        first = file.read_bytes()
        time.sleep(4 * RENEW_S)
        assert file.read_bytes() > first and len(file.read_bytes()) == len(first)
    assert list(file.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), held(file):
        raise ZeroDivisionError
    assert list(file.parent.iterdir()) == []


def test_a_living_process_of_this_host_is_named_at_once(file: Path) -> None:
    with held(file):
        began, content = time.monotonic(), file.read_bytes()
        words = rf"folder out is in use by process {os.getpid()} on host .*running"
        with pytest.raises(RequestError, match=words), held(file):
            pass
        assert time.monotonic() - began < SILENCE_S
        assert lease_file.holder_line(file.read_bytes()) == lease_file.holder_line(content)


def test_two_names_of_a_folder_have_one_lease(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    one, other = (held(tmp_path / name / ".lease") for name in ("out", "link"))
    with one, pytest.raises(RequestError, match="in use"), other:
        pass


def ended_process() -> Holder:
    """This host's, and no longer running."""
    process = subprocess.Popen(["sleep", "60"])
    holder = replace(this_process(60.0), pid=process.pid, start_ticks=start_ticks(process.pid) or 0)
    process.kill()
    process.wait()
    return holder


def test_a_process_that_was_killed_is_followed_at_once(file: Path) -> None:
    leave(file, ended_process())
    began = time.monotonic()
    with held(file):
        assert time.monotonic() - began < 1 and b"sleep" not in file.read_bytes()


def test_a_process_with_the_number_of_an_ended_one_is_another(file: Path) -> None:
    leave(file, replace(this_process(60.0), start_ticks=5))
    with held(file):
        pass


def test_a_process_that_was_killed_but_is_still_listed_has_ended(file: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    holder = replace(this_process(60.0), pid=process.pid, start_ticks=start_ticks(process.pid) or 0)
    assert holder.has_ended() is False
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert holder.has_ended() is True
    process.wait()


@pytest.mark.parametrize("change", [{"host": "other"}, {"boot": "other"}, {"pid_namespace": "pid:[1]"}, {"boot": ""}])
def test_a_process_of_another_host_or_container_cannot_be_seen(change: dict[str, Any]) -> None:
    assert replace(ended_process(), **change).has_ended() is None


def test_a_holder_elsewhere_that_renews_is_respected(file: Path) -> None:
    with renewing(file, ELSEWHERE):
        words = r"process 77 on host node007 \(Slurm job 5\).*has renewed its lease"
        with pytest.raises(RequestError, match=words), held(file):
            pass
        assert lease_file.holds(file, ELSEWHERE.to_bytes())


@pytest.mark.parametrize("left", [ELSEWHERE.to_bytes() + b"000000000007\n", ELSEWHERE.to_bytes()[:-9], b""])
def test_a_silent_holder_elsewhere_is_followed_after_it_was_watched(
    file: Path, left: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flm_megatron.checkpoint.lease.watch.RENEW_S", RENEW_S)  # for a holder that cannot be read
    file.write_bytes(left)
    began = time.monotonic()
    with held(file):
        assert time.monotonic() - began >= SILENCE_S
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 99, b"[" * 99999, b"{}\n", b'{"pid": -1}\n', b"[]", ELSEWHERE.to_bytes().replace(b"0.1}", b"1e99}")],
)
def test_a_first_line_that_is_none_names_nobody(content: bytes) -> None:
    assert Holder.from_bytes(content) is None


def test_a_name_cannot_control_the_terminal() -> None:
    assert "\x1b" not in str(replace(ELSEWHERE, host="\x1b[2J"))


def test_a_claim_that_a_killed_taker_left_is_no_obstacle(file: Path) -> None:
    leave(file, ended_process())
    leave(lease_file.claim_of(file, lease_file.holder_line(file.read_bytes())), ended_process())
    with held(file):
        pass
    assert list(file.parent.iterdir()) == []


def test_a_holder_that_wakes_while_it_is_being_replaced_stays(file: Path) -> None:
    leave(file, ELSEWHERE)
    judged, ours = file.read_bytes(), this_process(RENEW_S).to_bytes()
    assert lease_file.create(lease_file.claim_of(file, ELSEWHERE.to_bytes()), ours)
    lease_file.renew(file, ELSEWHERE.to_bytes(), 1)
    assert not lease_file.take_over(file, judged, ours)
    assert lease_file.holds(file, ELSEWHERE.to_bytes()) and list(file.parent.iterdir()) == [file]


def test_a_holder_that_is_being_replaced_leaves_the_file_to_its_successor(file: Path) -> None:
    leave(file, ELSEWHERE)
    judged, ours = file.read_bytes(), this_process(RENEW_S).to_bytes()
    assert lease_file.create(lease_file.claim_of(file, ELSEWHERE.to_bytes()), ours)
    lease_file.give_up(file, ELSEWHERE.to_bytes())
    assert lease_file.take_over(file, judged, ours)
    lease_file.give_up(file, ELSEWHERE.to_bytes())
    assert lease_file.holds(file, ours)


def test_a_lease_that_was_removed_by_hand_is_made_again(file: Path) -> None:
    with held(file):
        file.unlink()
        time.sleep(4 * RENEW_S)
        assert file.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    missing = held(tmp_path / "missing" / ".lease")
    with pytest.raises(RequestError, match="cannot be written: No such file"), missing:
        pass


def take(file: Path, gate: Barrier, results: str) -> None:
    """One of several that come at once; stays until all have had their turn."""
    gate.wait()
    try:
        with held(file):
            (Path(results) / f"won-{os.getpid()}").touch()
            gate.wait()
    except FlmError as error:
        (Path(results) / f"lost-{os.getpid()}").write_text(str(error))
        gate.wait()


@pytest.mark.parametrize("before", ["none", "ended", "silent"])
def test_of_many_that_come_at_once_one_wins(file: Path, tmp_path: Path, before: str) -> None:
    results = tmp_path / "results"
    results.mkdir()
    if before != "none":
        leave(file, ended_process() if before == "ended" else ELSEWHERE)
    gate = CONTEXT.Barrier(8)
    takers = [CONTEXT.Process(target=take, args=(file, gate, str(results))) for _ in range(8)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(60)
    assert [taker.exitcode for taker in takers] == [0] * 8
    winner = next(results.glob("won-*")).name.removeprefix("won-")
    losers = [path.read_text() for path in results.glob("lost-*")]
    assert len(losers) == 7 and all(f"in use by process {winner} on" in text for text in losers)
    assert list(tmp_path.iterdir()) == [results]


def come_and_go(file: Path) -> None:
    """Take the lease again and again; three times in ten be killed while holding it. `flock` is the witness."""
    draw = random.Random(os.getpid())
    while True:
        with suppress(RequestError), held(file), (file.parent / "witness").open("a") as witness:
            try:
                fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                (file.parent / f"two-held-{os.getpid()}").touch()
            witness.write("x")
            witness.flush()
            if draw.random() < 0.3:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.004 * draw.random())
        time.sleep(0.003 * draw.random())


def test_two_never_hold_it_however_many_come_go_and_are_killed(file: Path) -> None:
    processes: list[BaseProcess] = []
    deadline, witness = time.monotonic() + 20, file.parent / "witness"
    witness.touch()
    while witness.stat().st_size < 40 and time.monotonic() < deadline:
        processes = [process for process in processes if process.is_alive()]
        while len(processes) < 6:
            processes.append(CONTEXT.Process(target=come_and_go, args=(file,)))
            processes[-1].start()
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.join()
    assert not list(file.parent.glob("two-held-*")) and witness.stat().st_size > 1
    with held(file):
        assert sorted(entry.name for entry in file.parent.iterdir()) == [file.name, "witness"]


def hold_for_ever(file: Path, words: Path) -> None:
    """Hold the lease until the process is ended."""

    def lost(text: str) -> None:
        words.write_text(text)

    with held(file, lost=lost):
        time.sleep(60)


def test_a_holder_that_was_stopped_and_replaced_ends_at_once(file: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    process = CONTEXT.Process(target=hold_for_ever, args=(file, words))
    process.start()
    while lease_file.read(file) is None:
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * RENEW_S)
    judged = lease_file.read(file)
    assert judged is not None
    # As a process on another host does it, which cannot see that the holder is only stopped.
    assert lease_file.create(lease_file.claim_of(file, lease_file.holder_line(judged)), ELSEWHERE.to_bytes())
    assert lease_file.take_over(file, judged, ELSEWHERE.to_bytes())
    os.kill(process.pid, signal.SIGCONT)
    process.join(10)
    assert process.exitcode == 1
    assert "taken over by process 77 on host node007" in words.read_text()
    assert lease_file.holds(file, ELSEWHERE.to_bytes())


JOB = {"SLURM_JOB_ID": "5", "TORCHELASTIC_RUN_ID": "none"}


def test_a_job_that_is_started_again_waits_for_its_earlier_ranks(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = replace(ELSEWHERE, job="Slurm job 5", attempt="0.0")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with renewing(file, earlier), pytest.raises(RequestError, match="in use"), held(file, patience_s=60):
        pass
    file.unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with renewing(file, earlier):
        began = time.monotonic()
        with pytest.raises(RequestError, match="in use"), held(file, patience_s=0.8):
            pass
        assert time.monotonic() - began >= 0.8
    with held(file, patience_s=60):
        pass
    assert "waiting up to 0.6 s" in caplog.text


def test_jobs_are_named_as_their_schedulers_do() -> None:
    assert job_of({}) == job_of({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}) == ("", "")
    assert job_of(JOB | {"SLURM_RESTART_COUNT": "3"}) == ("Slurm job 5", "3.0")
    assert job_of({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}) == ("run x", "0.2")


def write_slowly(path: Path) -> None:
    """A tool that does not come to an end."""
    with destination(path, Processes(), 0) as folder:
        (folder / "half").touch()
        time.sleep(60)


def half_written(path: Path) -> bool:
    return any(path.parent.glob(f"{path.name}~*.partial/half"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_folder_that_one_tool_is_writing_is_not_taken_by_another(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "new" / "out"
    first = CONTEXT.Process(target=write_slowly, args=(path,))
    first.start()
    while not half_written(path):
        time.sleep(0.01)
    words = f"new/out is in use by process {first.pid}.*another destination"
    with pytest.raises(RequestError, match=words), destination(path, Processes(), 0):
        pass
    assert half_written(path) and first.pid is not None
    os.kill(first.pid, number)
    first.join(10)
    assert half_written(path) == (number == signal.SIGKILL)
    with destination(path, Processes(), 0) as folder:
        assert not half_written(path)
        (folder / "whole").touch()
    assert [entry.relative_to(path.parent).as_posix() for entry in path.parent.rglob("*")] == ["out", "out/whole"]
