"""The stream of samples: what it holds, and that nothing but the data and the seed changes it."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.config.schema import DataConfig, SourceConfig
from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.streams.stream import SampleStream, validation_streams
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import DamagedError, RequestError
from tests.support import data_cases

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets `web` (40 documents), `code` (25), `held` and `other` (8) and their tokenizer."""
    path = tmp_path_factory.mktemp("sets")
    data_cases.datasets(path, {"web": 40, "code": 25, "held": 8, "other": 8})
    return path


def _ids(stream: SampleStream, count: int) -> list[tuple[str, int, int]]:
    return [stream.sample_ids(i) for i in range(count)]


def test_samples_are_the_documents_laid_end_to_end(folder: Path) -> None:
    """One pass holds each document once and whole, but for what is over at the end; labels are one id ahead."""
    stream = SampleStream(data_cases.config(folder, {"web": 1}, epochs=True), seed=1)
    assert stream.limit_samples is not None
    samples = {stream.sample_ids(i)[2]: stream[i] for i in range(stream.limit_samples)}
    order = stream.sources[0]._dataset.shuffle_index.tolist()
    ordered = [samples[order.index(row)] for row in range(len(order))]
    for one, following in pairwise(ordered):
        assert torch.equal(one["tokens"][1:], one["labels"][:-1])
        assert one["labels"][-1] == following["tokens"][0]
    model = open_tokenizer(folder / "tokenizer_320.model")
    ids = [*torch.cat([sample["tokens"] for sample in ordered]).tolist(), int(ordered[-1]["labels"][-1])]
    assert stream.sources[0].description.tokens - LENGTH < len(ids) <= stream.sources[0].description.tokens
    ends = [place for place, value in enumerate(ids) if value == model.eod]
    texts = [model.decode(ids[start:end]) for start, end in zip([0, *[e + 1 for e in ends]], ends, strict=False)]
    assert len(texts) == len(set(texts)) >= 38
    assert set(texts) <= set(data_cases.texts(40, seed=0))


def test_fields_of_a_sample(folder: Path) -> None:
    """Types and shapes; the loss counts every token."""
    sample = SampleStream(data_cases.config(folder, {"web": 1}), seed=1)[3]
    assert list(sample) == ["tokens", "labels", "loss_mask", "position_ids"]
    assert {value.shape for value in sample.values()} == {(LENGTH,)}
    assert [value.dtype for value in sample.values()] == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert sample["loss_mask"].tolist() == [1.0] * LENGTH
    assert sample["position_ids"].tolist() == list(range(LENGTH))


def test_a_sample_knows_its_text(folder: Path) -> None:
    """`documents` names the documents of the dataset that the ids come from."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stream = SampleStream(data_cases.config(folder, {"web": 1}), seed=1)
    indexed = IndexedDataset(str(folder / "web"))
    for index in range(10):
        name, documents = stream.documents(index)
        joined = " ".join(str(i) for document in documents for i in indexed[document].tolist())
        assert name == "web"
        assert " ".join(map(str, stream[index]["tokens"].tolist())) in joined


def test_a_sample_is_found_by_its_name(folder: Path) -> None:
    data = data_cases.config(folder, {"web": 1.0})
    data.train[0].name = "crawl/web"  # names may have slashes
    stream = SampleStream(data, seed=3)
    (name,) = stream.names(5)
    item = stream[5]
    assert name.startswith("crawl/web/0/")
    assert stream.ids(name) == [*item["tokens"].tolist(), int(item["labels"][-1])]
    for wrong in ("nonsense", "crawl/web", "crawl/web/0/x", "crawl/web/0/99999", "other/0/1", ""):
        with pytest.raises(RequestError, match="there is no sample"):
            stream.ids(wrong)


def test_each_pass_takes_every_sample_once_in_another_order(folder: Path) -> None:
    """Three passes of one source, and no two alike."""
    stream = SampleStream(data_cases.config(folder, {"web": 3}, epochs=True), seed=1)
    size = len(stream.sources[0])
    ids = _ids(stream, 3 * size)
    passes = [ids[epoch * size : (epoch + 1) * size] for epoch in range(3)]
    for epoch, one in enumerate(passes):
        assert sorted(one) == [("web", epoch, sample) for sample in range(size)]
    assert len({tuple(sample for _, _, sample in one) for one in passes}) == 3


def test_a_longer_budget_keeps_every_earlier_sample(folder: Path) -> None:
    """With weights there is no budget in the order at all: asking for more, or first for the end, changes no id."""
    data = data_cases.config(folder, {"web": 0.7, "code": 0.3})
    long = SampleStream(data, seed=5)
    long[2000]
    ids, short = _ids(long, 2000), SampleStream(data, seed=5)
    assert _ids(short, 50) == ids[:50]
    for index in (0, 17, 49, 1999):
        for field, value in short[index].items():
            assert torch.equal(value, long[index][field])
    assert max(epoch for _, epoch, _ in ids) > 2


def test_the_seed_and_only_the_seed_changes_the_order(folder: Path, tmp_path: Path) -> None:
    """Same seed, same ids and text with another cache folder; another seed, another order."""
    data = data_cases.config(folder, {"web": 1, "code": 1})
    elsewhere = DataConfig(LENGTH, train=data.train, cache=str(tmp_path / "cache"))
    first, again, other = SampleStream(data, 5), SampleStream(elsewhere, 5), SampleStream(data, 6)
    assert _ids(first, 100) == _ids(again, 100) != _ids(other, 100)
    assert all(torch.equal(first[i]["tokens"], again[i]["tokens"]) for i in range(100))
    assert any(not torch.equal(first[i]["tokens"], other[i]["tokens"]) for i in range(10))


def test_weights_are_shares_of_the_samples(folder: Path) -> None:
    """A source with a weight of 0.25 has a quarter of the samples at every place, however small it is."""
    stream = SampleStream(data_cases.config(folder, {"web": 0.75, "code": 0.25}), seed=5)
    assert stream.limit_samples is None
    for count in (4, 40, 1000):
        assert Counter(name for name, _, _ in _ids(stream, count)) == {"web": count * 3 // 4, "code": count // 4}
    assert stream.epochs(1000)["code"] == 250 / len(stream.sources[1])


def test_without_weights_sources_are_blended_by_size(folder: Path) -> None:
    """After as many samples as there are, each source has been gone through once; then it goes on."""
    data = DataConfig(LENGTH, train=[SourceConfig(path=str(folder / name)) for name in ("web", "code")])
    stream = SampleStream(data, seed=5)
    total = sum(map(len, stream.sources))
    assert stream.limit_samples is None
    assert stream.epochs(total) == {"web": 1.0, "code": 1.0}
    assert {epoch for _, epoch, _ in _ids(stream, total)} == {0}
    assert stream.sample_ids(total)[1] == 1


def test_epochs_are_taken_exactly_and_then_the_stream_ends(folder: Path) -> None:
    """Each sample of `code` twice, half of `web`; one sample more is refused with the number of tokens."""
    stream = SampleStream(data_cases.config(folder, {"web": 0.5, "code": 2}, epochs=True), seed=5)
    web, code = map(len, stream.sources)
    limit = stream.limit_samples
    assert limit == round(0.5 * web) + 2 * code
    counts = Counter((name, sample) for name, _, sample in _ids(stream, limit))
    assert [counts["code", sample] for sample in range(code)] == [2] * code
    assert sum(counts["web", sample] for sample in range(web)) == round(0.5 * web)
    assert max(counts["web", sample] for sample in range(web)) == 1
    message = rf"the data ends after {limit * LENGTH:,} tokens \({limit:,} samples of 32\)"
    with pytest.raises(RequestError, match=message):
        stream[limit]
    with pytest.raises(RequestError, match=rf"{message}, but {(limit + 1) * LENGTH:,} are asked for"):
        stream.check_budget(limit + 1)
    stream.check_budget(limit)


def test_validation_is_one_pass_over_each_source_in_order(folder: Path) -> None:
    """By name, in the order of the run file, the same samples whatever the training sources and their stage are."""
    validation = [SourceConfig(path=str(folder / "held")), SourceConfig(path=str(folder / "other"), name="second")]
    data = DataConfig(LENGTH, train=data_cases.sources(folder, {"web": 1}), validation=validation)
    streams = validation_streams(data, seed=3)
    assert list(streams) == ["held", "second"]
    other = validation_streams(DataConfig(LENGTH, validation=validation), seed=3)
    for name, stream in streams.items():
        assert stream.limit_samples == len(stream.sources[0])
        assert _ids(stream, stream.limit_samples) == _ids(other[name], stream.limit_samples)
        assert torch.equal(stream[0]["tokens"], other[name][0]["tokens"])
    with pytest.raises(RequestError, match="the data ends after"):
        streams["held"][len(streams["held"].sources[0])]


def test_a_moved_dataset_keeps_its_order_and_its_index(folder: Path, tmp_path: Path) -> None:
    """The order follows from the content, not from the path."""
    model, cache = open_tokenizer(folder / "tokenizer_320.model"), str(tmp_path / "cache")
    ids = []
    for place in ("here", "there"):
        build_dataset(data_cases.texts(30, seed=9), model, tmp_path / place / "set")
        data = DataConfig(LENGTH, train=[SourceConfig(path=str(tmp_path / place / "set"))], cache=cache)
        stream = SampleStream(data, seed=5)
        ids.append([(stream.sample_ids(i), stream[i]["tokens"].tolist()) for i in range(20)])
    assert ids[0] == ids[1]
    assert len([path for path in Path(cache).iterdir() if path.is_dir()]) == 1


BAD_SOURCES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "none": ([], r"data\.train has no sources"),
    "one without a weight": ([{"weight": 1.0}, {}], r"data\.train: weight is given to 1 of 2 sources, but not .*code"),
    "a weight of 0": ([{"weight": 1.0}, {"weight": 0.0}], "weight is 0.0 for .*, give above 0"),
    "epochs below 0": ([{"epochs": -1.0}], "epochs is -1.0 for .*, give above 0"),
    "weights and epochs": ([{"weight": 1.0, "epochs": 1.0}], "weight and epochs are both given"),
    "one name twice": ([{}, {"name": "web"}], "data.train has two sources named 'web'"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_sources_that_make_no_blend(folder: Path, case: str) -> None:
    """Each is named with its values."""
    fields, message = BAD_SOURCES[case]
    paths = [str(folder / name) for name in ("web", "code")]
    configs = [SourceConfig(path=path, **field) for path, field in zip(paths, fields, strict=False)]
    with pytest.raises(RequestError, match=message):
        SampleStream(DataConfig(LENGTH, train=configs), seed=5)


def test_data_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    """A truncated .bin, another tokenizer, too little text and a cache that cannot be made."""
    model = data_cases.datasets(tmp_path, {"a": 4})
    other = data_cases.tokenizer(tmp_path, 300)
    build_dataset(data_cases.texts(4), other, tmp_path / "b")
    with pytest.raises(RequestError, match="different tokenizers"):
        SampleStream(data_cases.config(tmp_path, {"a": 1, "b": 1}), seed=5)
    tokens = len(model.encode("".join(data_cases.texts(4)))) + 4
    with pytest.raises(RequestError, match=rf"a has {tokens} tokens, too few for one sample of {tokens}"):
        SampleStream(data_cases.config(tmp_path, {"a": 1}, sequence_length=tokens), seed=5)
    assert SampleStream(data_cases.config(tmp_path, {"a": 1}, sequence_length=tokens - 1), seed=5)[0]
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"cannot write sample indices: .*set data\.cache"):
        SampleStream(DataConfig(LENGTH, train=data_cases.sources(folder, {"web": 1}), cache=f"{tmp_path}/file/x"), 5)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    with pytest.raises(DamagedError, match=r"a\.bin has \d+ bytes but \d+ were written"):
        SampleStream(data_cases.config(tmp_path, {"a": 1}), seed=5)


DAMAGED_INDICES = {
    "cut short": lambda data: data[:-8],
    "empty": lambda data: b"",
    "a pickle that runs a command": lambda data: pickle.dumps(_Payload()),
}


class _Payload:
    """What a planted file does when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


@pytest.mark.parametrize("case", DAMAGED_INDICES)
def test_a_damaged_index_is_found_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The message names the folder to remove; after that the index is built again."""
    monkeypatch.chdir(tmp_path)
    data_cases.datasets(tmp_path, {"a": 10})
    data = data_cases.config(tmp_path, {"a": 1})
    ids = _ids(SampleStream(data, seed=5), 20)
    path = next((tmp_path / "a_cache").glob("*/*shuffle_index.npy"))
    path.write_bytes(DAMAGED_INDICES[case](path.read_bytes()))
    with pytest.raises(DamagedError, match=rf"sample index {path.parent} cannot be read .*remove that folder"):
        SampleStream(data, seed=5)
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(path.parent)
    assert _ids(SampleStream(data, seed=5), 20) == ids
