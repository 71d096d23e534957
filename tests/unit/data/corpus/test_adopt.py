"""Datasets that megatron-core's own builder made are described in place, and trained on; others are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.corpus.adopt import adopt_dataset
from flm_megatron.data.corpus.corpus import Corpus
from flm_megatron.data.corpus.description import read_description
from flm_megatron.data.corpus.source import Source
from flm_megatron.data.corpus.statistics import unigram_entropy
from flm_megatron.data.corpus.verify import verify_dataset
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import DamagedError, RequestError
from tests.support import data_cases

DTYPES = (numpy.uint16, numpy.int32, numpy.int64, numpy.int16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer."""
    return data_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def preprocessed(
    prefix: Path, documents: Sequence[list[int]], dtype: Any = numpy.int32, lengths: Sequence[list[int]] | None = None
) -> Path:
    """What Megatron-LM's preprocess_data.py makes of these ids, with megatron-core's builder: documents without text
    are numbered, but have no sequence."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for number, ids in enumerate(documents):
        builder.add_document(numpy.array(ids, dtype=dtype), lengths[number] if lengths else [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


def encoded(tokenizer: Tokenizer, count: int = 12, ended: bool = True) -> list[list[int]]:
    """Ids of texts, the fourth of them empty."""
    texts = [[*tokenizer.encode(text), *([tokenizer.eod] if ended else [])] for text in data_cases.texts(count)]
    return [*texts[:3], [], *texts[3:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: numpy.dtype(dtype).name)
def test_every_type_of_ids_is_described_and_read(tmp_path: Path, tokenizer: Tokenizer, dtype: Any) -> None:
    documents = encoded(tokenizer)
    prefix = preprocessed(tmp_path / "text", documents, dtype)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = adopt_dataset(prefix, tokenizer)
    made, text = found.description, "".join(data_cases.texts(12)).encode()
    assert (made.documents, made.tokens, found.ended) == (12, sum(map(len, documents)), 12)
    assert made.text_bytes == len(text) and found.unreadable == 0  # all of so small a dataset is the sample
    assert made.sha256 == hashlib.sha256((tmp_path / "text.bin").read_bytes()).hexdigest()
    assert {path: path.read_bytes() for path in before} == before
    assert read_description(prefix) == verify_dataset(prefix) == made
    source = Source(SourceConfig(str(prefix)), 16, 3, str(tmp_path / "cache"))
    line = source.text(0, len(source) * 16).tolist()
    assert sorted(line) != line and set(line) <= {number for ids in documents for number in ids}
    assert unigram_entropy(prefix, prefix).nats_per_token > 0


def test_documents_without_an_end_are_counted(tmp_path: Path, tokenizer: Tokenizer, capsys: Any) -> None:
    prefix = preprocessed(tmp_path / "text", encoded(tokenizer, ended=False))
    assert main(["data", "adopt", str(prefix), "--tokenizer", tokenizer.path]) == 0
    said = capsys.readouterr().out
    assert f"0 of 12 documents end with id {tokenizer.eod}" in said and "WARNING: 12 documents do not end" in said


def test_a_long_document_is_sampled_and_the_estimate_is_near(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(data_cases.texts(400))
    prefix = preprocessed(tmp_path / "text", [tokenizer.encode(text), *encoded(tokenizer)])
    size = len((text + "".join(data_cases.texts(12))).encode())
    assert adopt_dataset(prefix, tokenizer).description.text_bytes == pytest.approx(size, rel=0.1)


def test_elsewhere_the_description_stands_beside_links(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = preprocessed(tmp_path / "text", encoded(tokenizer))
    adopt_dataset(prefix, tokenizer, tmp_path / "new" / "mine")
    assert not (tmp_path / "text.json").exists() and (tmp_path / "new" / "mine.bin").is_symlink()
    assert verify_dataset(tmp_path / "new" / "mine").documents == 12


def split(prefix: Path, tokenizer: Tokenizer) -> None:
    """Documents of two sentences."""
    preprocessed(prefix, [[5, 6, 7, 8]] * 3, lengths=[[2, 2]] * 3)


def strange(prefix: Path, tokenizer: Tokenizer) -> None:
    """An id that the tokenizer does not have."""
    preprocessed(prefix, [[5, 6, tokenizer.vocab_size]])


def negative(prefix: Path, tokenizer: Tokenizer) -> None:
    """An id below zero."""
    preprocessed(prefix, [[5, -1]])


def floats(prefix: Path, tokenizer: Tokenizer) -> None:
    """Values that are no ids."""
    preprocessed(prefix, [[5, 6]], numpy.float32)


def shorter(prefix: Path, tokenizer: Tokenizer) -> None:
    """A .bin of which an end is missing."""
    file = Path(f"{preprocessed(prefix, encoded(tokenizer))}.bin")
    file.write_bytes(file.read_bytes()[:-4])


def cut_index(prefix: Path, tokenizer: Tokenizer) -> None:
    """An index of which an end is missing."""
    file = Path(f"{preprocessed(prefix, encoded(tokenizer))}.idx")
    file.write_bytes(file.read_bytes()[:-4])


def empty(prefix: Path, tokenizer: Tokenizer) -> None:
    """A dataset of nothing."""
    preprocessed(prefix, [[]])


def no_index(prefix: Path, tokenizer: Tokenizer) -> None:
    """A .bin alone."""
    Path(f"{preprocessed(prefix, encoded(tokenizer))}.idx").unlink()


def described(prefix: Path, tokenizer: Tokenizer) -> None:
    """A dataset that has a description."""
    adopt_dataset(preprocessed(prefix, encoded(tokenizer)), tokenizer)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (split, RequestError, "holds documents as several sequences (preprocess_data.py --split-sentences"),
        (strange, RequestError, "holds id 320, but tokenizer"),
        (negative, RequestError, "holds id -1, but tokenizer"),
        (floats, DamagedError, "is not the index of a dataset"),
        (shorter, DamagedError, "does not fit"),
        (cut_index, DamagedError, "which is not the index of 12 documents"),
        (empty, RequestError, "has no documents"),
        (no_index, RequestError, "text.idx is missing: give the prefix"),
        (described, RequestError, "text.json exists: choose another --out"),
    ],
)
def test_what_is_refused_is_left_as_it_is(
    tmp_path: Path, tokenizer: Tokenizer, make: Any, kind: type[Exception], words: str
) -> None:
    make(tmp_path / "text", tokenizer)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(kind) as said:
        adopt_dataset(tmp_path / "text", tokenizer)
    assert words in str(said.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_meets_one_names_the_command(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prefix = preprocessed(tmp_path / "text", encoded(tokenizer))
    with pytest.raises(RequestError, match=f"with `flm data adopt {prefix} --tokenizer TOKENIZER`"):
        read_description(prefix)


def test_a_folder_of_which_no_file_is_taken_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "book").write_text("text")
    with pytest.raises(RequestError, match='take its files without an ending with --suffixes ""'):
        list(Corpus([tmp_path / "bare"]).files())
    assert list(Corpus([tmp_path / "bare"], suffixes=[""]).documents()) == ["text"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.tex").write_text("text")
    with pytest.raises(RequestError, match=r"choose with --suffixes; there are \.tex"):
        list(Corpus([tmp_path / "other"]).files())
