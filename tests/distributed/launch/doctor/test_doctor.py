"""`flm doctor` on one host: what would stop a run is found before it, and nothing else is called a stop."""

from __future__ import annotations

import os
import resource
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from flm_megatron.cli.doctor import largest_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.engine.version import require_engine
from flm_megatron.errors import RequestError
from flm_megatron.launch.doctor import host as host_checks
from flm_megatron.launch.doctor.findings import Finding, render, status_of
from flm_megatron.launch.doctor.peers import clocks, different_facts
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.training.step import TrainState
from tests.support.runs import make_run

Usage = namedtuple("Usage", "total used free")


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Status and lines of the screen."""
    status = main(["doctor", *arguments])
    captured = capsys.readouterr()
    assert not captured.err
    return status, captured.out.splitlines()


def line_of(lines: list[str], topic: str) -> str:
    """The line on a topic."""
    return next(line for line in lines if line[4:].strip().startswith(topic))


def test_a_sound_host_is_one_screen_and_status_zero(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = make_run(data, tmp_path)
    with socket.create_server(("", 0)) as taken:
        free_port = taken.getsockname()[1]
    status, lines = doctor(capsys, str(source), "--port", str(free_port))
    assert status == 0 and len(lines) < 20
    assert not any(line.startswith("stop") for line in lines)
    assert f"megatron-core {require_engine()}" in line_of(lines, "versions")
    assert "te not found" in line_of(lines, "kernels") or "te found" in line_of(lines, "kernels")
    assert "2 dataset(s)" in line_of(lines, "data")
    assert lines[-1].startswith("Nothing would stop the run")


def test_ranks_are_rehearsed_where_that_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    source, _ = make_run(data, tmp_path)
    with socket.create_server(("", 0)) as taken:
        free_port = str(taken.getsockname()[1])
    status, lines = doctor(capsys, str(source), "--port", free_port, "--rehearse")
    assert status == 0 and "ranks meet in every collective" in line_of(lines, "rehearsal")

    def broken(self: TrainState, *arguments: object) -> object:
        """A step that a rank cannot take."""
        raise RequestError("no step today")

    monkeypatch.setattr(TrainState, "train_step", broken)
    status, lines = doctor(capsys, str(source), "--port", free_port, "--rehearse")
    assert status == 2 and "no step today" in line_of(lines, "rehearsal")


@pytest.mark.parametrize(
    ("overrides", "topic", "words"),
    [
        (["--tokenizer", "/nowhere/t.model"], "data", "/nowhere/t.model"),
        (["--data.train.0.path", "/nowhere/train"], "data", "/nowhere/train"),
        (["--output", "/proc/run"], "disk", "cannot be written"),
        (["--stages.0.parallel.tensor", "3"], "run file", "num_attention_heads"),
        (["--kernels.adamw", "te"], "kernels", "transformer_engine"),
        (["--checkpoint.initial", "/nowhere/checkpoint"], "data", "/nowhere/checkpoint"),
    ],
)
def test_what_would_stop_the_run_is_status_two(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], topic: str, words: str
) -> None:
    source, _ = make_run(data, tmp_path)
    status, lines = doctor(capsys, str(source), *overrides)
    line = line_of(lines, topic)
    assert status == 2 and line.startswith("stop") and words in line
    assert lines[-1].startswith("The run would fail")


def test_a_taken_port_is_a_stop(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = make_run(data, tmp_path)
    with socket.create_server(("", 0)) as taken:
        status, lines = doctor(capsys, str(source), "--port", str(taken.getsockname()[1]))
    assert status == 2 and "give torchrun another one" in line_of(lines, "port")


def test_the_size_of_a_checkpoint_is_that_of_a_real_one(data: Path, tmp_path: Path) -> None:
    _, run = make_run(data, tmp_path, "--stages.0.tokens", "256")
    assert train(resolve(run)) == 0
    folder = tmp_path / "checkpoints" / "small" / "step_00000002"
    real = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    predicted = largest_checkpoint(run)
    assert predicted is not None and abs(real - predicted) < 0.1 * predicted


@pytest.mark.parametrize(("checkpoints", "level"), [(0.5, "stop"), (2, "warn"), (3.5, "ok")])
def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: float, level: str) -> None:
    _, run = make_run(tmp_path, tmp_path, "--checkpoint.keep_last", "2")
    free = int(checkpoints * 2**30)
    monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - free, free))
    assert host_checks.disk(run, 2**30).level == level


def test_few_open_files_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        finding = host_checks.limits(896)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.level == "warn" and "896 ranks" in finding.text


def test_a_card_that_is_not_there_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nocard0")
    assert host_checks.network_name(True).level == "stop"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert host_checks.network_name(True).text == "gloo uses lo"


def test_clocks_far_apart_are_named() -> None:
    hosts = {0: "a", 4: "b", 8: "c"}
    (wrong,) = clocks(hosts, {4: 0.01, 8: -90.5})
    assert (wrong.level, wrong.host) == ("warn", "c") and "-90.5 s" in wrong.text
    (fine,) = clocks(hosts, {4: 0.01, 8: -0.02})
    assert fine.level == "ok" and "0.020 s" in fine.text


def test_facts_that_differ_name_both_hosts() -> None:
    same = {"torch": "2.13.0", "dataset /d": "abc"}
    assert [each.level for each in different_facts([("a", same), ("b", same)])] == ["ok"]
    other = {"torch": "2.12.0"}
    findings = different_facts([("a", same), ("b", same), ("c", other)])
    assert [each.level for each in findings] == ["stop", "stop"]
    assert findings[0].text == "torch is 2.13.0 on a and 2.12.0 on c"
    assert findings[1].text == "dataset /d is abc on a and missing on c"


def test_many_hosts_make_one_screen() -> None:
    findings = [Finding("ok", "devices", "8 x h100", f"h{number}") for number in range(112)]
    findings += [Finding("stop", "disk", "full", f"h{number}") for number in range(5)]
    lines = render(findings).splitlines()
    assert len(lines) == 3 and lines[0] == "ok    devices  8 x h100"
    assert lines[1] == "stop  disk     full [h0, h1, h2 and 2 more]"
    assert status_of(findings) == 2 and status_of(findings[:112]) == 0
