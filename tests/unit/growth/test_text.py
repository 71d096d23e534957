"""The samples on which growths are certified: from the run's data, or from a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flm_megatron.config.schema import DataConfig, RunConfig
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.growth.certificate.text import file_tokens, run_tokens
from tests.support import data_cases

LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets and their tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    data_cases.datasets(folder, {"web": 20, "code": 10})
    return folder


def run_of(folder: Path, data: DataConfig | None = None) -> RunConfig:
    return RunConfig(data=data or DataConfig(LENGTH), tokenizer=str(folder / "tokenizer_320.model"))


def text_of(run: RunConfig, path: Path, tokens: int) -> list[int]:
    """Write a text of exactly so many tokens to `path`, and give them."""
    tokenizer = open_tokenizer(run.tokenizer or "")
    ids = tokenizer.encode(" ".join(data_cases.texts(3)))[:tokens]
    path.write_text(tokenizer.decode(ids), encoding="utf-8")
    assert tokenizer.encode(path.read_text(encoding="utf-8")) == ids and len(ids) == tokens
    return ids


@pytest.mark.parametrize(
    ("tokens", "samples", "rows"), [(9, 5, 1), (17, 5, 1), (18, 5, 2), (47, 5, 5), (47, 3, 3), (300, 4, 4)]
)
def test_a_text_is_cut_into_whole_samples(folder: Path, tmp_path: Path, tokens: int, samples: int, rows: int) -> None:
    """One after the other, from the start; each has a token more than the model sees, for its labels."""
    run = run_of(folder)
    ids = text_of(run, tmp_path / "x", tokens)
    assert file_tokens(tmp_path / "x", run, samples).tolist() == [ids[9 * row : 9 * row + 9] for row in range(rows)]


def test_a_text_that_does_not_serve_is_refused(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder)
    text_of(run, tmp_path / "short", 8)
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    for name, words in (
        ("short", "has 8 tokens, one sample takes 9: give a longer text"),
        ("bytes", "is not UTF-8 text: .* at byte 3"),
        ("none", "none: cannot be read: No such file"),
    ):
        with pytest.raises(RequestError, match=words):
            file_tokens(tmp_path / name, run, 4)
    run.tokenizer = None
    with pytest.raises(RequestError, match="names no tokenizer"):
        file_tokens(tmp_path / "short", run, 4)


@pytest.mark.parametrize("validation", [True, False])
def test_a_runs_own_samples_are_the_first_that_it_validates_on(folder: Path, validation: bool) -> None:
    """Of its training data where it has none for validation."""
    web, code = (data_cases.sources(folder, {name: 1}) for name in ("web", "code"))
    run = run_of(folder, DataConfig(LENGTH, web, code if validation else []))
    found = run_tokens(run, 6)
    assert found.shape == (6, LENGTH + 1)
    stream = SampleStream(run.data, run.seed, "validation" if validation else "train")
    assert stream.sample_ids(0)[0] == ("code" if validation else "web")
    for index, row in enumerate(found):
        assert torch.equal(row[:-1], stream[index]["tokens"]) and torch.equal(row[1:], stream[index]["labels"])


def test_no_more_samples_than_there_are(folder: Path) -> None:
    data = data_cases.config(folder, {"code": 1}, epochs=True, sequence_length=200)
    found = run_tokens(run_of(folder, data), 10**6)
    assert 1 < len(found) < 100 and torch.equal(run_tokens(run_of(folder, data), 2), found[:2])
