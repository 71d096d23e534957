"""Copies and blocks of objects on this machine are whole, of one version, and within their size."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from flm_megatron.errors import RequestError
from flm_megatron.storage import store
from flm_megatron.storage.cache import blocks, place
from flm_megatron.storage.cache.blocks import BlockReader
from flm_megatron.storage.cache.whole import file_at
from tests.support.object_store import ObjectStore

DATA = random.Random(0).randbytes(100_000)


def reader(url: str) -> BlockReader:
    found = store.info(url)
    assert found is not None
    return BlockReader(found)


def copied(url: str) -> Path:
    found = file_at(url)
    assert found is not None
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4096)


def test_a_copy_is_brought_once_and_anew_when_the_object_changes(object_store: ObjectStore, tmp_path: Path) -> None:
    object_store.put("folder/tokenizer.model", DATA)
    url = object_store.url("folder/tokenizer.model")
    first = copied(url)
    assert first.name == "tokenizer.model" and first.read_bytes() == DATA
    assert file_at(url) == first and object_store.count("get") == 1
    object_store.put("folder/tokenizer.model", DATA[::-1])
    assert copied(url).read_bytes() == DATA[::-1] and first.read_bytes() == DATA
    (tmp_path / "local").touch()
    assert file_at(tmp_path / "local") == tmp_path / "local"
    assert file_at(object_store.url("nothing")) is None and file_at(tmp_path / "nothing") is None


def test_half_a_copy_is_never_taken(object_store: ObjectStore, cache: Path) -> None:
    object_store.put("a", DATA)
    object_store.truncate("a", 1000, times=None)
    with pytest.raises(RequestError, match="cannot be read"):
        file_at(object_store.url("a"))
    assert [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")] == []
    object_store.end()
    copy = copied(object_store.url("a"))
    copy.write_bytes(DATA[:10])  # a disk that lost the rest
    assert copied(object_store.url("a")).read_bytes() == DATA


@pytest.mark.usefixtures("small_blocks")
def test_ranges_come_out_of_blocks_that_are_fetched_once(object_store: ObjectStore) -> None:
    object_store.put("a.bin", DATA)
    draw, url = random.Random(1), object_store.url("a.bin")
    for read in (reader(url), reader(url)):
        for _ in range(200):
            start, stop = sorted(draw.randrange(len(DATA) + 1) for _ in range(2))
            stop = min(stop, start + 9000)
            assert read.read(start, stop) == DATA[start:stop]
    assert read.read(0, len(DATA)) == DATA
    assert object_store.count("get", "a.bin") == -(-len(DATA) // 4096)


@pytest.mark.usefixtures("small_blocks")
def test_many_readers_fetch_a_block_once(object_store: ObjectStore) -> None:
    object_store.put("a.bin", DATA)
    object_store.slow("get", delay_s=0.05)
    readers = [reader(object_store.url("a.bin")) for _ in range(6)]
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda one=one: found.append(one.read(0, 8192))) for one in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [DATA[:8192]] * 6 and object_store.count("get", "a.bin") == 2


@pytest.mark.usefixtures("small_blocks")
def test_what_is_wanted_is_here_before_it_is_read(object_store: ObjectStore) -> None:
    object_store.put("a.bin", DATA)
    object_store.slow("get", delay_s=0.1)
    read = reader(object_store.url("a.bin"))
    read.want(0, 8192)
    read.want(40_000, 40_001)
    read.want(0, 100)
    while read._waiting:
        time.sleep(0.01)
    began = time.perf_counter()
    assert read.read(0, 8192) == DATA[:8192] and read.read(40_000, 40_001) == DATA[40_000:40_001]
    assert time.perf_counter() - began < 0.1 and object_store.count("get", "a.bin") == 3
    read.close()


@pytest.mark.usefixtures("small_blocks")
def test_a_store_that_fails_in_the_background_is_asked_again_when_it_is_read(object_store: ObjectStore) -> None:
    object_store.put("a.bin", DATA)
    object_store.fail("get", "a.bin", times=3)
    read = reader(object_store.url("a.bin"))
    read.want(0, 1)
    while read._waiting:
        time.sleep(0.01)
    assert read.read(0, 100) == DATA[:100]
    object_store.fail("get", "a.bin", times=None)
    with pytest.raises(RequestError, match=r"a\.bin cannot be read.*3 tries"):
        read.read(50_000, 50_100)
    read.close()


@pytest.mark.usefixtures("small_blocks")
def test_versions_never_meet(object_store: ObjectStore) -> None:
    object_store.put("a.bin", DATA)
    read = reader(object_store.url("a.bin"))
    assert read.read(0, 10) == DATA[:10]
    object_store.put("a.bin", DATA[::-1])
    with pytest.raises(RequestError, match="changed while it was read: write new data under a new name"):
        read.read(5000, 5010)
    assert reader(object_store.url("a.bin")).read(0, 10) == DATA[::-1][:10]


@pytest.mark.usefixtures("small_blocks")
def test_a_block_that_lost_bytes_is_fetched_anew(object_store: ObjectStore, cache: Path) -> None:
    object_store.put("a.bin", DATA)
    read = reader(object_store.url("a.bin"))
    read.read(0, 4096)
    (block,) = [path for path in cache.glob("blocks/*/*") if path.name[0] != "."]
    os.truncate(block, 100)
    assert read.read(0, 4096) == DATA[:4096]


@pytest.mark.usefixtures("small_blocks")
def test_the_cache_keeps_within_its_size(
    object_store: ObjectStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLM_CACHE_GIB", str(40_000 / 2**30))
    monkeypatch.setattr(place, "USE_RESOLUTION_S", 0.0)
    object_store.put("a.bin", DATA)
    object_store.put("small", DATA[:5000])
    whole = copied(object_store.url("small"))
    read = reader(object_store.url("a.bin"))
    for start in range(0, len(DATA) - 4096, 4096):
        assert read.read(start, start + 10) == DATA[start : start + 10]
        assert read.read(0, 10) == DATA[:10]  # in use all the time, so that it stays
        time.sleep(0.002)
    kept = [path for path in cache.rglob("*") if path.is_file() and path.name[0] != "."]
    assert sum(path.stat().st_size for path in kept) <= 40_000 and whole in kept
    assert object_store.count("get", "a.bin") == 24
    assert read.read(4096, 4100) == DATA[4096:4100] and object_store.count("get", "a.bin") == 25


@pytest.mark.usefixtures("small_blocks")
def test_a_disk_that_takes_nothing_costs_time_alone(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    object_store.put("a.bin", DATA)
    read = reader(object_store.url("a.bin"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert read.read(0, 9000) == DATA[:9000] and read.read(0, 9000) == DATA[:9000]
    assert capfd.readouterr().err.count("takes no more (No space left on device)") == 1


def test_a_size_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLM_CACHE_GIB", "much")
    with pytest.raises(RequestError, match="FLM_CACHE_GIB is 'much'"):
        place.size_limit()
