"""Objects of a real S3 server that fails: what is read and written is whole, or one line says that it is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flm_megatron.errors import RequestError
from flm_megatron.storage import retry, store
from tests.support.object_store import SECRET_KEY, ObjectStore

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)


def test_objects_go_there_and_back(object_store: ObjectStore, tmp_path: Path) -> None:
    url = object_store.url("a/b")
    store.write(url, DATA)
    found = store.info(url)
    assert object_store.get("a/b") == DATA == store.read(url) and store.read_range(url, 3, 300) == DATA[3:300]
    assert found == store.ObjectInfo(url, len(DATA), found.version if found else "")
    assert store.info(object_store.url("a")) is None and store.info(object_store.url("nothing")) is None
    store.download(found, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    store.remove(url)
    store.remove(url)
    assert object_store.all_keys() == []


def test_one_list_shows_everything_below(object_store: ObjectStore) -> None:
    for name in ("a/x", "a/b/y", "ab"):
        object_store.put(name, name.encode())
    assert [(one.url, one.size) for one in store.below(object_store.url("a"))] == [
        (object_store.url("a/b/y"), 5),
        (object_store.url("a/x"), 3),
    ]
    assert object_store.count("list") == 1 and object_store.count("head") == 0
    assert store.below(object_store.url("nothing")) == []


@pytest.mark.parametrize("how", ["500", "503", "before", "truncate", "hang"])
def test_a_read_is_tried_again(object_store: ObjectStore, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.put("a", DATA)
    if how == "truncate":
        fault = object_store.truncate("a", 100, times=2)
    elif how == "hang":
        monkeypatch.setattr(retry, "REQUEST_TIMEOUT_S", 2.0)
        fault = object_store.hang("get", "a", times=1)
    elif how == "before":
        fault = object_store.drop("get", "a", times=2)
    else:
        fault = object_store.fail("get", "a", status=int(how), times=2)
    assert store.read_range(object_store.url("a"), 0, len(DATA)) == DATA and fault.met == fault.times


@pytest.mark.parametrize("how", ["500", "before", "after"])
def test_a_write_is_tried_again(object_store: ObjectStore, how: str) -> None:
    if how == "500":
        fault = object_store.fail("put", "a", status=500, times=2)
    else:
        fault = object_store.drop("put", "a", when=how, times=2)
    store.write(object_store.url("a"), DATA)
    assert object_store.get("a") == DATA and fault.met == 2


def test_a_store_that_goes_on_failing_is_one_line(object_store: ObjectStore) -> None:
    object_store.put("a", DATA)
    fault = object_store.fail("get", "a", times=None)
    with pytest.raises(RequestError, match=r"s3://test-\d+/a cannot be read: .* \(3 tries in . s\)") as failure:
        store.read_range(object_store.url("a"), 0, 5)
    assert fault.met == 3 and "\n" not in str(failure.value) and SECRET_KEY not in str(failure.value)


def test_a_hang_is_bounded(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "REQUEST_TIMEOUT_S", 0.5)
    object_store.hang("put")
    began = time.monotonic()
    with pytest.raises(RequestError, match="cannot be written: no answer in time"):
        store.write(object_store.url("a"), DATA)
    assert time.monotonic() - began < 5


def test_no_access_is_not_tried_again(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.put("a", DATA)
    fault = object_store.fail("get", "a", status=403, times=None)
    with pytest.raises(RequestError, match="give this process the right"):
        store.read_range(object_store.url("a"), 0, 5)
    assert fault.met == 1
    with pytest.raises(FileNotFoundError):
        store.read_range(object_store.url("b"), 0, 5)


def test_large_files_go_up_in_parts_and_half_ones_never_appear(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PART", 5 * 2**20)
    path, data = tmp_path / "file", DATA * 1200
    path.write_bytes(data)
    object_store.fail("part", "big", after=1, times=1)
    store.upload(path, object_store.url("big"))
    assert object_store.get("big") == data and object_store.open_uploads() == []
    assert object_store.count("part", "big") > 3
    object_store.fail("part", "half", after=1, times=None)
    with pytest.raises(RequestError, match="half cannot be written"):
        store.upload(path, object_store.url("half"))
    assert object_store.all_keys() == ["big"] and object_store.open_uploads() == []


def test_an_object_that_changes_while_it_is_read_is_refused(object_store: ObjectStore, tmp_path: Path) -> None:
    object_store.put("a", DATA)
    found = store.info(object_store.url("a"))
    assert found is not None
    object_store.put("a", DATA[::-1])
    with pytest.raises(RequestError, match="changed while it was read"):
        store.download(found, tmp_path / "copy")
