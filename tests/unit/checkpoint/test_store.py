"""Which checkpoint a run goes on from, which are kept, and what interrupted saving leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.checkpoint.files import manifest
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import DamagedError, RequestError
from tests.support.checkpoint_cases import flip

CHECKPOINT = InitialCheckpoint(ModelConfig(1, 8, 8, 1, vocab_size=16), seed=1)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


def save(store: CheckpointStore, stage: str, *steps: int) -> None:
    for step in steps:
        copy_checkpoint(CHECKPOINT, store.path(stage, step), Manifest.from_json({"step": step, "stage": stage}))


def test_latest_is_the_newest_of_the_last_stage(store: CheckpointStore) -> None:
    assert store.latest(["first", "second"]) is None
    save(store, "first", 5, 10)
    assert store.path("first", 10).name == "step_00000010"
    assert store.latest(["first", "second"]) == store.path("first", 10)
    save(store, "second", 2)
    assert store.latest(["first", "second"]) == store.path("second", 2)
    assert store.latest(["first"]) == store.path("first", 10)


@pytest.mark.parametrize("harm", ["truncate", "remove", "metadata", "manifest", "partial"])
def test_latest_passes_over_what_cannot_be_loaded(
    store: CheckpointStore, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, "s", 1, 2)
    newest = store.path("s", 2)
    if harm == "truncate":
        os.truncate(newest / "__0_0.distcp", 100)
    elif harm == "remove":
        (newest / "__0_0.distcp").unlink()
    elif harm == "metadata":
        size = (newest / ".metadata").stat().st_size
        (newest / ".metadata").write_bytes(b"x" * size)
    elif harm == "manifest":
        (newest / "manifest.json").unlink()
    else:
        newest.rename(newest.with_name(newest.name + ".partial"))
    assert store.latest(["s"]) == store.path("s", 1)
    assert (str(newest) in caplog.text) == (harm != "partial")


def test_pruning_keeps_the_last_and_every_nth(store: CheckpointStore) -> None:
    save(store, "s", *range(1, 10))
    removed = store.prune("s", keep_last=2, keep_every_steps=4)
    assert store.steps("s") == [4, 8, 9]
    assert [path.name[-1] for path in removed] == ["1", "2", "3", "5", "6", "7"]
    store.prune("s", keep_last=0)
    assert store.steps("s") == [9]
    assert store.prune("missing", keep_last=1) == []


def test_pruning_counts_only_what_is_whole(store: CheckpointStore) -> None:
    save(store, "s", 1, 2, 3)
    (store.path("s", 3) / "common.pt").unlink()
    store.prune("s", keep_last=1)
    assert store.steps("s") == [2, 3]
    assert store.clean(["s"]) == [] and store.steps("s") == [2, 3]  # nothing is renamed
    again = store.new_path("s", 3, [path.name for path in store.newest("s")])
    assert again.name == "step_00000003.1"
    copy_checkpoint(CHECKPOINT, again, Manifest.from_json({"step": 3, "stage": "s"}))
    assert store.latest(["s"]) == again and store.steps("s") == [2, 3]
    assert [path.name for path in store.prune("s", keep_last=1)] == ["step_00000002", "step_00000003"]
    assert store.newest("s") == [again]


def test_what_is_not_damaged_but_cannot_be_read_stops_the_search(store: CheckpointStore) -> None:
    save(store, "s", 1, 2)
    manifest = store.path("s", 2) / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(RequestError, match="version 99"):
        store.latest(["s"])
    manifest.unlink()
    manifest.mkdir()  # stands for a disk that answers with an error
    with pytest.raises(RequestError, match="see to its disk"):
        store.latest(["s"])
    (store.root / "t").touch()
    with pytest.raises(RequestError, match="cannot be listed"):
        store.latest(["s", "t"])
    assert store.steps("s") == [1, 2]


def test_no_checkpoint_is_not_the_same_as_none_that_is_whole(store: CheckpointStore) -> None:
    save(store, "s", 1, 2)
    for step in (1, 2):
        (store.path("s", step) / ".metadata").unlink()
    with pytest.raises(DamagedError, match=r"none of the 2 checkpoints .*step_00000002.*--start-anew"):
        store.latest(["s"])
    assert store.steps("s") == [1, 2]


def test_a_checkpoint_that_was_found_changed_is_passed_over_until_its_note_is_removed(store: CheckpointStore) -> None:
    save(store, "s", 1, 2)
    newest = store.path("s", 2)
    flip(newest / "__0_0.distcp", (newest / "__0_0.distcp").stat().st_size // 2)
    checkpoint = open_checkpoint(store.latest(["s"]) or "")
    with pytest.raises(DamagedError) as caught:
        for name in checkpoint.tensors:
            checkpoint.read(name)
    store.note_damage(caught.value)
    assert store.latest(["s"]) == store.path("s", 1)
    store.prune("s", keep_last=1)
    assert store.steps("s") == [1, 2]  # the one that is whole is never dropped for one that is not
    (note,) = (store.root / "s").glob("*.json")
    note.unlink()
    assert store.latest(["s"]) == newest


def test_a_note_whose_checkpoint_was_removed_does_not_speak_of_the_next_one(store: CheckpointStore) -> None:
    save(store, "s", 1, 2)
    store.note_damage(DamagedError("changed", store.path("s", 2)))
    shutil.rmtree(store.path("s", 2))
    again = store.new_path("s", 2, store.taken("s"))
    assert again.name == "step_00000002.1"
    copy_checkpoint(CHECKPOINT, again, Manifest.from_json({"step": 2, "stage": "s"}))
    assert store.latest(["s"]) == again
    assert store.taken("s") == ("step_00000001", "step_00000002", "step_00000002.1") and store.taken("t") == ()


def test_a_note_that_cannot_be_written_does_not_hide_the_damage(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, "s", 1)
    (store.root / "s" / "step_00000001.damage.json").mkdir()
    store.note_damage(DamagedError("changed", store.path("s", 1)))
    assert "step_00000001.damage.json: cannot be written: Is a directory" in caplog.text


def test_damage_elsewhere_is_not_noted(tmp_path: Path) -> None:
    others = [CheckpointStore(tmp_path / name) for name in ("before", "within/t")]
    own = CheckpointStore(tmp_path / "within")
    for each in (own, *others):
        save(each, "s", 1)
    paths = [tmp_path / "within/s", tmp_path / "within/a/b", *(other.path("s", 1) for other in others)]
    for error in (DamagedError("data"), *(DamagedError("elsewhere", path) for path in paths)):
        own.note_damage(error)
    assert list(tmp_path.rglob("*.damage.json")) == []
    own.note_damage(DamagedError("here", own.path("s", 1)))
    assert [path.parent for path in tmp_path.rglob("*.damage.json")] == [own.root / "s"]


def test_what_cannot_be_removed_does_not_end_a_run(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, "s", 1, 2, 3)

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        assert store.prune("s", keep_last=1) == []
    assert "old checkpoints of stage 's' are not all removed" in caplog.text and "step_00000001" in caplog.text
    assert store.steps("s") == [1, 2, 3]
    assert len(store.prune("s", keep_last=1)) == 2


def test_pruning_reads_only_the_manifests_of_what_it_keeps_for_being_new(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that keeps a hundred checkpoints does not read a hundred metadata files at each save."""
    save(store, "s", *range(1, 31))
    read: list[str] = []
    monkeypatch.setattr("flm_megatron.checkpoint.files.manifest._read", recorder(read, manifest._read))
    assert len(store.prune("s", keep_last=2, keep_every_steps=1)) == 0
    assert read == ["step_00000030/manifest.json", "step_00000029/manifest.json"]
    read.clear()
    save(store, "s", 31)
    read.clear()
    assert len(store.prune("s", keep_last=2, keep_every_steps=1)) == 0
    assert read == ["step_00000031/manifest.json"]  # the one before was whole
    read.clear()
    assert CheckpointStore(store.root).prune("s", keep_last=31) == [] and read == []  # there are no more
    assert store.clean(["s"]) == [] and read == []
    store.latest(["s"])
    assert {name.split("/")[0] for name in read} == {"step_00000031"}


def recorder(seen: list[str], function: Callable[[Path], bytes]) -> Callable[[Path], bytes]:
    """`function`, which puts down the last two parts of what it was called with."""

    def record(path: Path) -> bytes:
        seen.append("/".join(path.parts[-2:]))
        return function(path)

    return record


@pytest.mark.parametrize("suffix", [".partial", "~0123abcd.partial"])
def test_left_overs_are_cleaned_but_not_what_may_be_written_now(store: CheckpointStore, suffix: str) -> None:
    """Those of earlier versions too, which had no token."""
    save(store, "s", 5)
    old, new = (store.path("s", step).with_name(f"step_{step:08d}{suffix}") for step in (3, 8))
    old.mkdir()
    new.mkdir()
    store.prune("s", keep_last=1)
    assert not old.exists() and new.exists()
    assert store.clean(["s", "t"]) == [new]
    assert not new.exists() and store.steps("s") == [5]


SLOW_WRITER = """
import sys, time
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import DamagedError, RequestError
from tests.support.checkpoint_cases import flip

class Slow(InitialCheckpoint):
    def read(self, name, region=None):
        time.sleep(0.02)
        return super().read(name, region)

copy_checkpoint(Slow(ModelConfig(4, 64, 64, 4, vocab_size=999), 1), sys.argv[1], chunk_bytes=4000)
"""


def test_killed_in_the_middle_of_a_write(store: CheckpointStore) -> None:
    path = store.path("s", 7)
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(path)])

    def partial() -> list[Path]:
        return list(path.parent.glob(f"{path.name}~*.partial"))

    def grown(shard: Path) -> bool:
        return shard.exists() and shard.stat().st_size > 20000

    try:
        deadline = time.monotonic() + 60
        while not any(grown(folder / "__0_0.distcp") for folder in partial()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial() and not path.exists() and store.latest(["s"]) is None
    save(store, "s", 7)  # starting again takes the left-over's place
    assert not partial() and open_checkpoint(store.latest(["s"]) or "").manifest.position.step == 7
