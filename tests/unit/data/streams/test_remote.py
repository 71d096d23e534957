"""Datasets, tokenizers and texts in a store: the same samples as from the disk, whatever the store does meanwhile."""

from __future__ import annotations

import json
import shutil
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from flm_megatron.cli.main import main
from flm_megatron.config.schema import DataConfig, SourceConfig
from flm_megatron.data.conversations.conversation import read_conversations
from flm_megatron.data.corpus.description import file_of, read_description
from flm_megatron.data.streams.loader import Batch, batches, validation_batches
from flm_megatron.data.streams.stream import SampleStream, validation_streams
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.evaluation.perplexity.run import read_documents
from flm_megatron.storage import retry
from flm_megatron.storage.cache import blocks
from tests.support import data_cases
from tests.support.object_store import ObjectStore
from tests.support.tokenizer_cases import TURN, hugging_face


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets `a` and `b`."""
    folder = tmp_path_factory.mktemp("local")
    data_cases.datasets(folder, {"a": 120, "b": 60})
    return folder


@pytest.fixture
def store(object_store: ObjectStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The same datasets in the store, whose blocks are small and whose pauses short."""
    monkeypatch.setenv("FLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "ATTEMPTS", 3)
    for path in folder.iterdir():
        if path.is_file():
            object_store.put(f"corpus/{path.name}", path.read_bytes())
    return object_store


def data(root: str, cache: str | None = None) -> DataConfig:
    sources = [SourceConfig(f"{root}/a", weight=0.7), SourceConfig(f"{root}/b", weight=0.3)]
    return DataConfig(sequence_length=32, train=sources, validation=sources[1:], cache=cache)


def equal(ours: list[list[Batch]], theirs: list[list[Batch]]) -> bool:
    flat = [[field for step in steps for batch in step for field in batch.values()] for steps in (ours, theirs)]
    return len(flat[0]) > 0 and all(map(torch.equal, *flat))


def steps(data: DataConfig, count: int, start: int = 0) -> list[list[Batch]]:
    feed = batches(SampleStream(data, 7), start, 8, 2, 1, 2)
    found = list(islice(feed, count))
    feed.close()
    return found


@pytest.mark.slow
def test_samples_are_those_of_the_disk(store: ObjectStore, folder: Path) -> None:
    store.fail("get", r"\.bin$", status=500, after=3, times=2)
    store.drop("get", r"\.bin$", times=1)
    assert equal(steps(data(store.url("corpus")), 20), steps(data(str(folder)), 20))
    (ours,), (theirs,) = (validation_streams(data(root), 7).values() for root in (store.url("corpus"), str(folder)))
    assert equal(*(list(validation_batches(stream, 20, 8, 2, 0, 1)) for stream in (ours, theirs)))
    assert [SampleStream(data(store.url("corpus")), 7).names(index) for index in range(40)] == [
        SampleStream(data(str(folder)), 7).names(index) for index in range(40)
    ]


def test_every_block_comes_once_and_ahead_of_its_step(store: ObjectStore) -> None:
    url = store.url("corpus")
    store.slow("get", r"\.bin$", delay_s=0.05)
    feed = batches(SampleStream(data(url), 7), 0, 8, 2, 0, 1, prefetch=1)
    next(feed)
    waited = 0.0
    for _ in range(20):
        time.sleep(0.1)  # a step of training
        began = time.perf_counter()
        next(feed)
        waited += time.perf_counter() - began
    feed.close()
    sizes = [read_description(f"{url}/{name}").bin_bytes for name in "ab"]
    assert store.count("get", r"\.bin$") <= sum(-(-size // 4096) for size in sizes)
    assert waited < 1.0  # one by one, the blocks of these samples take longer


def test_a_store_that_goes_on_failing_ends_in_one_line(store: ObjectStore) -> None:
    stream = SampleStream(data(store.url("corpus")), 7)
    store.fail("get", r"\.bin$", times=None)
    with pytest.raises(RequestError, match=r"s3://.*/corpus/[ab]\.bin cannot be read: .* \(3 tries"):
        next(batches(stream, 0, 8, 2, 0, 1))


def test_a_dataset_that_changes_is_refused(store: ObjectStore) -> None:
    stream = SampleStream(data(store.url("corpus")), 7)
    for name in "ab":
        store.put(f"corpus/{name}.bin", bytes(len(store.get(f"corpus/{name}.bin"))))
    with pytest.raises(RequestError, match="changed while it was read"):
        next(batches(stream, 0, 8, 2, 0, 1))


def test_half_a_dataset_is_never_taken_for_whole(store: ObjectStore) -> None:
    url, whole = store.url("corpus/a"), store.get("corpus/a.bin")
    store.put("corpus/a.bin", whole[:-2])
    with pytest.raises(DamagedError, match=rf"a\.bin has {len(whole) - 2} bytes but {len(whole)} were written"):
        read_description(url)
    store.client().delete_object(Bucket=store.bucket, Key="corpus/a.bin")
    with pytest.raises(RequestError, match=rf"dataset {url}: {url}\.bin is missing"):
        read_description(url)
    store.truncate(r"b\.idx", 50, times=None)
    with pytest.raises(RequestError, match=r"b\.idx cannot be read"):
        read_description(store.url("corpus/b"))


def test_verify_reads_all_of_it(store: ObjectStore, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", store.url("corpus/a"), store.url("corpus/b")]) == 0
    wrong = bytearray(store.get("corpus/a.bin"))
    wrong[10] ^= 1
    store.put("corpus/a.bin", bytes(wrong))
    assert main(["data", "verify", store.url("corpus/a")]) == 1
    assert f"{store.url('corpus/a')}.bin: its ids are not those that were written" in capfd.readouterr().err


def test_tokenizers_conversations_and_texts_lie_in_the_store(store: ObjectStore, folder: Path) -> None:
    (model,) = folder.glob("*.model")
    ours, theirs = open_tokenizer(store.url(f"corpus/{model.name}")), open_tokenizer(model)
    assert ours.fingerprint == theirs.fingerprint and ours.encode("the sum is one") == theirs.encode("the sum is one")
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    store.put("chat.jsonl", json.dumps({"messages": turns}).encode())
    assert len(read_conversations(store.url("chat.jsonl"))) == 1
    store.put("text.txt", b"one document")
    assert read_documents(store.url("text.txt")) == ["one document"]
    for read in (open_tokenizer, read_conversations, read_documents):
        with pytest.raises(RequestError, match=r"s3://.*/nothing is not there"):
            read(store.url("nothing"))


def test_a_folder_of_a_tokenizer_lies_in_the_store(store: ObjectStore, tmp_path: Path) -> None:
    """With the files beside it, that say how documents end and chats are written."""
    here = hugging_face(tmp_path, eos=TURN)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        store.put(f"hf/{name}", (tmp_path / name).read_bytes())
    for place in ("hf", "hf/tokenizer.json"):
        found = open_tokenizer(store.url(place))
        assert found.path == store.url("hf/tokenizer.json") and found.fingerprint == here.fingerprint
        assert (found.eod, found.chat_template) == (here.eod, here.chat_template)


def test_the_disk_pays_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a folder of the cache."""
    monkeypatch.setenv("FLM_CACHE", str(tmp_path / "cache"))
    copied = tmp_path / "copied"
    copied.mkdir()
    for suffix in ("bin", "idx", "json"):
        for name in "ab":
            shutil.copy(file_of(folder / name, suffix), copied)
    monkeypatch.setattr("fsspec.filesystem", None)
    steps(data(str(copied)), 2)
    assert not (tmp_path / "cache").exists() and (copied / "a_cache").exists()
