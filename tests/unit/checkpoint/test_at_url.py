"""Checkpoints at URLs, on a real S3 server that fails: bit for bit those of a disk, and none half taken for whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from flm_megatron.checkpoint.files.at_url import remove_at_url
from flm_megatron.checkpoint.files.manifest import verify
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.storage import reading, retry, store, writing
from flm_megatron.storage.path import ObjectPath, location
from tests.support.checkpoint_cases import Memory
from tests.support.object_store import ObjectStore
from tests.support.pool import Pool, RankFailed

MANIFEST = Manifest(position=StagePosition(7, stage="small"))
TENSORS = {
    "big": torch.arange(3 * 2**20, dtype=torch.float32).reshape(1024, 3072),
    "small": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "none": torch.empty(0, 4),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits; several parts and ranges of small tensors."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)
    monkeypatch.setattr(writing, "PART", 5 * 2**20)
    monkeypatch.setattr(reading, "RANGE", 2**20)


def saved(url: str) -> Manifest:
    return copy_checkpoint(Memory(TENSORS), url, MANIFEST, Processes())


def test_it_is_the_one_of_a_disk(object_store: ObjectStore, tmp_path: Path) -> None:
    local = copy_checkpoint(Memory(TENSORS), tmp_path / "local", MANIFEST, Processes())
    url = object_store.url("run/step")
    assert saved(url).logical_hash == local.logical_hash
    keys = {key.removeprefix("run/step/") for key in object_store.all_keys("")}
    assert keys == {path.name for path in (tmp_path / "local").iterdir()}
    assert object_store.open_uploads() == [] and object_store.count("part") >= 3
    for name in keys - {".metadata", "common.pt"}:
        (tmp_path / "fetched").mkdir(exist_ok=True)
        assert object_store.get(f"run/step/{name}") == (tmp_path / "local" / name).read_bytes(), name
    opened = open_checkpoint(url)
    assert isinstance(opened, TorchDistCheckpoint) and opened.manifest == verify(url)
    for name, values in TENSORS.items():
        assert torch.equal(opened.read(name), values)
    assert torch.equal(opened.read("big", Region((5, 7), (1000, 9))), TENSORS["big"][5:1005, 7:16])
    assert main(["checkpoint", "diff", url, str(tmp_path / "local")]) == 2  # neither says its model: said in one line


def test_torch_reads_it(object_store: ObjectStore, tmp_path: Path) -> None:
    saved(object_store.url("step"))
    for key in object_store.all_keys(""):
        (tmp_path / Path(key).name).write_bytes(object_store.get(key))
    state: dict[str, Any] = {name: torch.empty_like(values) for name, values in TENSORS.items() if name != "none"}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(state[name], TENSORS[name]) for name in state)


def test_a_part_and_an_answer_that_are_lost_are_sent_again(object_store: ObjectStore) -> None:
    url = object_store.url("step")
    faults = [
        object_store.fail("part", "distcp", status=500, times=2),
        object_store.drop("complete", "distcp$", when="after"),
        object_store.drop("put", "manifest", when="after"),
        object_store.drop("get", "distcp$"),
    ]
    saved(url)
    assert torch.equal(TorchDistCheckpoint(url).read("big"), TENSORS["big"])
    assert [fault.met for fault in faults] == [2, 1, 1, 1] and object_store.open_uploads() == []


@pytest.mark.parametrize(("method", "key"), [("part", "distcp$"), ("complete", "distcp$"), ("put", "manifest")])
def test_a_save_that_fails_leaves_nothing(object_store: ObjectStore, method: str, key: str) -> None:
    object_store.fail(method, key, times=None)
    with pytest.raises(RequestError, match="cannot be written") as raised:
        saved(object_store.url("step"))
    assert "\n" not in str(raised.value) and object_store.url("step") in str(raised.value)
    assert object_store.all_keys("") == [] and object_store.open_uploads() == []


class Last(Memory):
    """The process that copies it is gone before its last tensor."""

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        if name == "small":
            os._exit(9)
        return super().read(name, region)


def die_while_saving(url: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    copy_checkpoint(Last(TENSORS), url, MANIFEST)


def test_what_a_killed_writer_leaves_is_no_checkpoint(object_store: ObjectStore, pool: Pool) -> None:
    url = object_store.url("step")
    with pytest.raises(RankFailed):
        pool.run(1, die_while_saving, url, object_store.environment)
    assert object_store.all_keys("") == ["step/.writing"]
    for name in ("__0_0.distcp", ".metadata", "metadata.json", "common.pt"):  # had it lived a moment longer
        object_store.put(f"step/{name}", b"half")
    with pytest.raises(DamagedError, match=r"has no manifest\.json"):
        verify(url)
    with pytest.raises(RequestError, match="left it half"):
        saved(url)
    assert object_store.get("step/.metadata") == b"half"


def names_asked(object_store: ObjectStore, *operations: str) -> list[str]:
    return [one.key.rpartition("/")[2] for one in object_store.requests if one.operation in operations]


def test_at_no_moment_of_writing_or_removing_is_half_taken_for_whole(object_store: ObjectStore) -> None:
    """Whatever object is the last that a process wrote or removed before it was killed."""
    url = object_store.url("step")
    saved(url)
    written = names_asked(object_store, "put", "complete")
    objects = {name: object_store.get(f"step/{name}") for name in written if name != ".writing"}
    assert written[0] == ".writing" and written[-1] == "manifest.json" and len(objects) == len(written) - 1
    object_store.requests.clear()
    remove_at_url(ObjectPath(url))
    removed = names_asked(object_store, "delete")
    assert sorted(removed) == sorted(objects)
    states = [written[1:count] for count in range(1, len(written))]
    states += [removed[count:] for count in range(1, len(removed))]
    for number, state in enumerate(states):
        half = object_store.url(f"half-{number}")
        for name in state:
            object_store.put(f"half-{number}/{name}", objects[name])
        with pytest.raises((DamagedError, RequestError)):
            open_checkpoint(half)
        assert main(["checkpoint", "verify", half]) != 0, state


def test_two_writers_and_what_is_there(object_store: ObjectStore) -> None:
    url = object_store.url("step")
    saved(url)
    before = {key: object_store.get(key) for key in object_store.all_keys("")}
    with pytest.raises(RequestError, match="exists already"):
        saved(url)
    assert {key: object_store.get(key) for key in object_store.all_keys("")} == before
    object_store.stale_lists()  # which do not show the claim of another
    assert store.create(object_store.url("new/.writing"), b"other")
    with pytest.raises(RequestError, match="is being written"):
        saved(object_store.url("new"))
    assert not [key for key in object_store.all_keys("new/") if not key.endswith(".writing")]


def test_damage_is_found(object_store: ObjectStore) -> None:
    url, key = object_store.url("step"), "step/__0_0.distcp"
    saved(url)
    whole = object_store.get(key)
    object_store.put(key, whole[:-5])
    with pytest.raises(DamagedError, match="instead of"):
        verify(url, quick=True)
    with pytest.raises(DamagedError, match=r"__0_0\.distcp"):
        open_checkpoint(url).read("big")
    object_store.put(key, whole[: 2**21] + bytes([whole[2**21] ^ 1]) + whole[2**21 + 1 :])
    with pytest.raises(DamagedError, match="have changed since they were written"):
        open_checkpoint(url).read("big")
    with pytest.raises(DamagedError, match="have changed"):
        verify(url)
    object_store.put(key, whole)
    store.remove(f"{url}/common.pt")
    with pytest.raises(DamagedError, match=r"common\.pt is missing"):
        verify(url, quick=True)


def test_a_quick_look_is_one_list(object_store: ObjectStore) -> None:
    saved(object_store.url("step"))
    object_store.requests.clear()
    verify(object_store.url("step"), quick=True)
    assert object_store.count("list") == 1 and object_store.count("head") <= 2  # of the manifest


def test_a_stale_list_does_not_hide_what_is_there(object_store: ObjectStore) -> None:
    object_store.stale_lists()
    saved(object_store.url("step"))
    assert verify(object_store.url("step")).position.step == 7


def test_memory_and_file_urls(tmp_path: Path) -> None:
    for url in ("memory://checkpoints/step", f"file://{tmp_path}/step"):
        if url.startswith("file"):
            (tmp_path / "step").mkdir()
        saved(url)
        assert torch.equal(open_checkpoint(url).read("big"), TENSORS["big"])
        with pytest.raises(RequestError, match="exists already"):
            saved(url)


def test_safetensors_are_read_in_place(object_store: ObjectStore, tmp_path: Path) -> None:
    from flm_megatron.checkpoint.hugging_face.safetensors import arrays_in

    save_file({"a": TENSORS["big"]}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    object_store.put("hf/model.safetensors", data)
    path = location(object_store.url("hf/model.safetensors"))
    assert torch.equal(arrays_in(path)["a"].read(), TENSORS["big"])
    object_store.put("hf/model.safetensors", data[:-4])
    with pytest.raises(DamagedError, match="not a whole safetensors file"):
        arrays_in(path)


def save_shared(url: str, environment: dict[str, str]) -> str:
    os.environ.update(environment)
    copy_checkpoint(Memory(TENSORS), url, MANIFEST, chunk_bytes=2**20)
    return verify(url).logical_hash


def test_ranks_write_one_together(object_store: ObjectStore, pool: Pool, tmp_path: Path) -> None:
    url = object_store.url("step")
    hashes = pool.run(2, save_shared, url, object_store.environment)
    local = copy_checkpoint(Memory(TENSORS), tmp_path / "local", MANIFEST, Processes())
    assert hashes == [local.logical_hash] * 2
    assert {"step/__0_0.distcp", "step/__1_0.distcp"} <= set(object_store.all_keys(""))
