"""A run's folder at a URL: what is there is whole, what is newer wins, and a failing store stops nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.checkpoint.files.manifest import file_entry, manifest_text, verify
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.launch.mirror import lease, mirrored, upload
from flm_megatron.launch.mirror.reading import run_at_hand
from flm_megatron.storage import retry
from tests.support.object_store import SECRET_KEY, ObjectStore

LAST = "run/checkpoints/small/step_00000002"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short waits, and a cache of the test's own."""
    monkeypatch.setenv("FLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.setattr(upload, "GROWING_BYTES_PER_S", 2**30)
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    monkeypatch.setattr(lease, "SILENT_S", 0.3)


def run(store: ObjectStore, folder: Path) -> RunConfig:
    stages = [StageConfig(name="small")]
    return RunConfig(output=str(folder), output_url=store.url("run"), output_url_interval_s=0.05, stages=stages)


def save(folder: Path, step: int) -> Path:
    """A checkpoint that is whole by its manifest."""
    path = folder / f"checkpoints/small/step_{step:08d}"
    path.mkdir(parents=True)
    data = {"__0_0.distcp": b"weights" * 1000 * step, ".metadata": b"rest", "common.pt": b"ours"}
    for name, content in data.items():
        (path / name).write_bytes(content)
    manifest = Manifest(files={name: file_entry(content) for name, content in data.items()})
    (path / "manifest.json").write_text(manifest_text(manifest))
    return path


def work(folder: Path, steps: int) -> None:
    """Metrics up to `steps`, and a checkpoint."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{steps}\n")
    save(folder, steps)


def test_another_machine_goes_on_where_the_first_ended(object_store: ObjectStore, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with mirrored.mirrored(run(object_store, first)):
        work(first, 1)
        work(first, 2)
        (first / ".hidden").touch()
        (first / "checkpoints/small/step_00000003~0a0b0c0d.partial").mkdir()
        (first / "checkpoints/small/step_00000003~0a0b0c0d.partial/half").touch()
    kept = [key for key in object_store.all_keys() if not key.endswith(".sessions")]
    assert f"{LAST}/manifest.json" in kept and "run/metrics.jsonl" in kept
    assert not [key for key in kept if "half" in key or "hidden" in key]
    with mirrored.mirrored(run(object_store, second)):
        assert (second / "metrics.jsonl").read_text() == "1\n2\n"
        assert [path.name for path in (second / "checkpoints/small").iterdir()] == ["step_00000002"]
        verify(second / "checkpoints/small/step_00000002")
        work(second, 4)
    with mirrored.mirrored(run(object_store, first)):  # which was overtaken
        assert (first / "metrics.jsonl").read_text() == "1\n2\n4\n"
        verify(first / "checkpoints/small/step_00000004")
    assert (tmp_path / "first.before-1/metrics.jsonl").read_text() == "1\n2\n"


def test_what_was_not_sent_is_newer_than_what_is_there(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with mirrored.mirrored(run(object_store, folder)):
        work(folder, 1)
    monkeypatch.setattr(upload, "END_S", 0.5)
    with mirrored.mirrored(run(object_store, folder)):
        object_store.hang()
        work(folder, 2)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    warnings = capfd.readouterr().err
    assert f"does not have all of this run: it lies in {folder}" in warnings and SECRET_KEY not in warnings
    object_store.put("run/.lease", b'{"host": "elsewhere", "id": "of a process that is gone, as its thread is"}')
    object_store.end()
    monkeypatch.setattr(upload, "END_S", 60.0)
    with mirrored.mirrored(run(object_store, folder)):
        assert (folder / "metrics.jsonl").read_text() == "1\n2\n"
    assert object_store.get("run/metrics.jsonl") == b"1\n2\n" and f"{LAST}/manifest.json" in object_store.all_keys()


def test_a_checkpoint_exists_by_its_manifest_alone(object_store: ObjectStore, tmp_path: Path) -> None:
    """Killed while it sends the second checkpoint; and another whose object lost its end."""
    first = tmp_path / "first"
    with mirrored.mirrored(run(object_store, first)):
        work(first, 1)
    for name in ("__0_0.distcp", ".metadata"):
        object_store.put(f"{LAST}/{name}", b"sent before the kill")
    shutil.copytree(first, tmp_path / "other")
    whole = save(tmp_path / "other", 3)
    for path in whole.iterdir():
        object_store.put(f"run/checkpoints/small/{whole.name}/{path.name}", path.read_bytes()[:100000])
    object_store.put(f"run/checkpoints/small/{whole.name}/__0_0.distcp", b"truncated")
    with mirrored.mirrored(run(object_store, tmp_path / "second")):
        found = sorted(path.name for path in (tmp_path / "second/checkpoints/small").iterdir())
        assert found == ["step_00000001"]


def test_the_manifest_goes_last_and_goes_first(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "RENEW_S", 0.05)
    folder = tmp_path / "run"
    with mirrored.mirrored(run(object_store, folder)):
        object_store.fail("put", "__0_0", times=3)
        work(folder, 1)
        _until(lambda: "run/checkpoints/small/step_00000001/manifest.json" in object_store.all_keys())
        work(folder, 2)
        shutil.rmtree(folder / "checkpoints/small/step_00000001")
        _until(lambda: not [key for key in object_store.all_keys() if "step_00000001" in key])
    asked = [(one.method, one.key.rsplit("/", 1)[-1]) for one in object_store.requests if "step_00000001" in one.key]
    puts = [name for method, name in asked if method == "PUT"]
    assert puts.index("common.pt") < puts.index(".metadata")  # by which half is not taken for another program's
    assert puts[-1] == "manifest.json" and puts.count("manifest.json") == 1 and puts.count("__0_0.distcp") == 4
    assert next(name for method, name in asked if method == "DELETE") == "manifest.json"


def test_a_store_that_fails_is_said_once_and_what_failed_is_sent_later(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(upload, "RENEW_S", 0.05)
    folder = tmp_path / "run"
    with mirrored.mirrored(run(object_store, folder)):
        fault = object_store.fail("put", times=None)
        work(folder, 1)
        _until(lambda: fault.met > 6)
        object_store.end()
    assert capfd.readouterr().err.count("WARNING") == 1 and object_store.get("run/metrics.jsonl") == b"1\n"


def test_a_second_run_is_refused_while_the_first_lives(object_store: ObjectStore, tmp_path: Path) -> None:
    line = rf"run is in use by process {os.getpid()} on .*, which is running"
    with mirrored.mirrored(run(object_store, tmp_path / "one")), pytest.raises(RequestError, match=line):
        mirrored.mirrored(run(object_store, tmp_path / "two")).__enter__()
    assert "run/.lease" not in object_store.all_keys()


def test_a_lease_elsewhere_is_watched_and_a_dead_one_taken_over(object_store: ObjectStore, tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for holder in ({"host": os.uname().nodename, "pid": int(ended.stdout)}, {"host": "elsewhere", "pid": 1}):
        object_store.put("run/.lease", json.dumps({**holder, "id": "other", "renewed": 3}).encode())
        with mirrored.mirrored(run(object_store, tmp_path / "one")):
            assert json.loads(object_store.get("run/.lease"))["id"] != "other"
    object_store.put("run/.lease", b'{"host": "elsewhere", "pid": 1, "id": "other", "renewed": 3}')
    ours = lease.UrlLease(object_store.url("run"))
    looks = iter(range(100))
    ours._found = lambda: f'{{"host": "elsewhere", "pid": 1, "renewed": {next(looks)}}}'.encode()  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="process 1 on elsewhere, which has renewed its lease"):
        ours.take()


def test_a_run_that_was_taken_over_sends_nothing_more(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(upload, "RENEW_S", 0.05)
    folder = tmp_path / "run"
    with mirrored.mirrored(run(object_store, folder)):
        object_store.put("run/.lease", b'{"host": "elsewhere", "pid": 1, "id": "other", "renewed": 0}')
        time.sleep(0.5)
        object_store.requests.clear()
        work(folder, 1)
        time.sleep(0.3)
    assert not [one for one in object_store.requests if one.method == "PUT"]
    assert "taken over by another run" in capfd.readouterr().err and "run/.lease" in object_store.all_keys()


def test_the_run_file_divides_the_output(tmp_path: Path) -> None:
    source = tmp_path / "run.yaml"
    source.write_text("output: s3://bucket/team/run1/\n")
    found = load_run(source)
    assert found.output_url == "s3://bucket/team/run1" and Path(found.output).parent == tmp_path / "cache/runs"
    source.write_text("output: s3://KEY:canary@bucket/run1\n")
    with pytest.raises(RequestError, match=r"output s3://\*\*\*@bucket/run1 holds a user, password") as refusal:
        load_run(source)
    assert "canary" not in str(refusal.value)
    source.write_text("output_url: folder\n")
    with pytest.raises(RequestError, match="output_url folder is no URL"):
        load_run(source)


def test_a_launchers_rank_is_refused(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RequestError, match="under a launcher give a folder that all machines share"):
        mirrored.mirrored(run(object_store, tmp_path / "run")).__enter__()
    assert object_store.requests == []


def test_tools_read_the_logs_alone(object_store: ObjectStore, tmp_path: Path) -> None:
    with mirrored.mirrored(run(object_store, tmp_path / "run")):
        work(tmp_path / "run", 1)
    folder = run_at_hand(object_store.url("run"))
    assert folder.name == "run" and [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    object_store.put("run/metrics.jsonl", b"more")
    assert (run_at_hand(object_store.url("run")) / "metrics.jsonl").read_bytes() == b"more"
    assert run_at_hand(tmp_path) == tmp_path
    with pytest.raises(RequestError, match="nothing: no run is there"):
        run_at_hand(object_store.url("nothing"))


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
