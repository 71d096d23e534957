"""A run whose data, tokenizer and output are in a store: killed, it goes on elsewhere, to the same bits."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.loader import load_run
from flm_megatron.training.resume.start import checkpoint_store
from tests.support import runs
from tests.support.object_store import SECRET_KEY, ObjectStore


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_on_another_machine(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.make_data(tmp_path)
    for path in data.iterdir():
        if path.is_file():
            object_store.put(f"data/{path.name}", path.read_bytes())
    more = "checkpoint: {interval_steps: 2}\noutput_url_interval_s: 0.2\n"
    local, remote = tmp_path / "local.yaml", tmp_path / "remote.yaml"
    local.write_text(runs.RUN.format(data=data, output=tmp_path / "local") + more)
    remote.write_text(runs.RUN.format(data=object_store.url("data"), output=object_store.url("run")) + more)
    assert runs.flm("train", local).returncode == 0

    monkeypatch.setenv("FLM_CACHE", str(tmp_path / "machine 1"))
    object_store.fail("", "^run/", status=500, after=30, times=2)
    process = runs.start_flm("train", remote, "--checkpoint.interval_steps", "2", "--stages.0.tokens", "1024")
    _wait_for(object_store, "run/checkpoints/small/step_00000004/manifest.json")
    process.kill()
    process.communicate()
    time.sleep(1)  # its ranks see that it is gone

    monkeypatch.setenv("FLM_CACHE", str(tmp_path / "machine 2"))
    went_on = runs.flm("train", remote)
    assert went_on.returncode == 0 and "small step 3/8" not in went_on.stdout, went_on.stderr
    assert runs.losses(Path(load_run(remote).output)) == runs.losses(tmp_path / "local")
    hashes = [_hash(load_run(path).output) for path in (local, remote)]
    assert hashes[0] == hashes[1]
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if SECRET_KEY.encode() in path.read_bytes()]
    assert not [key for key in object_store.all_keys() if SECRET_KEY.encode() in object_store.get(key)]
    assert SECRET_KEY not in went_on.stdout + went_on.stderr

    shutil.rmtree(tmp_path / "machine 2")
    report = runs.flm("report", object_store.url("run"), "--out", tmp_path / "report.html")
    assert report.returncode == 0 and SECRET_KEY not in (tmp_path / "report.html").read_text()


def _hash(output: str) -> str:
    from flm_megatron.config.schema import RunConfig

    path = checkpoint_store(RunConfig(output=output)).latest(["small"])
    assert path is not None
    return open_checkpoint(path).manifest.logical_hash


def _wait_for(store: ObjectStore, key: str) -> None:
    deadline = time.monotonic() + 120
    while key not in store.all_keys():
        assert time.monotonic() < deadline
        time.sleep(0.05)
