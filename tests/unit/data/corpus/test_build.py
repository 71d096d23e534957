"""Datasets: what is in them, that they are whole or absent, and that damage is found."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.schema import DataConfig, SourceConfig
from flm_megatron.data.corpus import description
from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.corpus.description import Description, check_datasets, file_of, read_description
from flm_megatron.data.corpus.index_file import IDX_HEADER
from flm_megatron.data.corpus.statistics import unigram_entropy
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import DamagedError, FlmError, RequestError
from tests.support import data_cases


def _read(prefix: Path) -> list[list[int]]:
    """Every document's ids, through megatron-core's reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_documents_come_back_and_are_counted(tmp_path: Path) -> None:
    """Each document is its text and an end-of-document id; documents without text are left out."""
    texts = ["", *data_cases.texts(5), "", "é\n"]
    model = data_cases.tokenizer(tmp_path)
    made = build_dataset(texts, model, tmp_path / "set")[str(tmp_path / "set")]
    documents = _read(tmp_path / "set")
    assert [model.decode(ids[:-1]) for ids in documents] == [text for text in texts if text]
    assert all(ids[-1] == model.eod and model.eod not in ids[:-1] for ids in documents)
    assert made.tokens == sum(map(len, documents))
    assert (made.documents, made.text_bytes) == (6, sum(len(text.encode()) for text in texts))
    assert (made.vocab_size, made.tokenizer) == (model.vocab_size, model.fingerprint)
    assert read_description(tmp_path / "set") == made


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process and three write the same bytes, over many batches, training and validation alike."""
    monkeypatch.setattr("flm_megatron.data.corpus.building.encoding.BATCH_CHARACTERS", 3000)
    model = data_cases.tokenizer(tmp_path)
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        build_dataset(data_cases.texts(200), model, folder / "set", workers=workers, validation_share=0.2)
    for one in sorted((tmp_path / "1").iterdir()):
        assert one.read_bytes() == (tmp_path / "3" / one.name).read_bytes(), one.name
    assert len(list((tmp_path / "1").iterdir())) == 6


def test_a_validation_share_splits_by_text(tmp_path: Path) -> None:
    """About that share, nothing lost or in both; equal documents stay on one side, whatever else there is."""
    model = data_cases.tokenizer(tmp_path)
    texts = data_cases.texts(400)
    build_dataset([*texts, *texts], model, tmp_path / "twice", validation_share=0.25)
    build_dataset(texts[:100], model, tmp_path / "part", validation_share=0.25)
    train, validation = (
        Counter(model.decode(ids[:-1]) for ids in _read(tmp_path / name)) for name in ("twice", "twice_validation")
    )
    assert train + validation == Counter([*texts, *texts])
    assert not train & validation
    assert 70 <= len(validation) <= 130
    assert {model.decode(ids[:-1]) for ids in _read(tmp_path / "part_validation")} == set(validation) & set(texts[:100])


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    """An error in the middle of the input removes the partial files."""

    def broken() -> Iterator[str]:
        yield "fine\n"
        raise RequestError("line 2 is bad")

    model = data_cases.tokenizer(tmp_path)
    for workers in (1, 2):
        with pytest.raises(RequestError, match="line 2 is bad"):
            build_dataset(broken(), model, tmp_path / "out" / "set", workers=workers)
    assert not list((tmp_path / "out").iterdir())


def test_a_worker_that_dies_ends_the_build(tmp_path: Path) -> None:
    """Rather than letting it wait for ever; nothing is left behind."""
    model = data_cases.tokenizer(tmp_path)
    Path(model.path).unlink()
    with pytest.raises(FlmError, match="an encoding process died"):
        build_dataset(data_cases.texts(3), model, tmp_path / "out" / "set", workers=2)
    assert not list((tmp_path / "out").iterdir())


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar over the bytes of the text; elsewhere nothing."""
    model, texts = data_cases.tokenizer(tmp_path), data_cases.texts(20)
    for terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("sys.stderr", screen)
        build_dataset(texts, model, tmp_path / f"set_{terminal}", total_bytes=sum(map(len, texts)))
        assert ("encoding: 100%" in screen.getvalue()) is terminal


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_an_existing_dataset_is_not_overwritten(tmp_path: Path, suffix: str) -> None:
    """Any of its files is enough to refuse."""
    model = data_cases.tokenizer(tmp_path)
    (tmp_path / f"set.{suffix}").write_text("mine")
    with pytest.raises(RequestError, match=rf"set\.{suffix} exists"):
        build_dataset(data_cases.texts(2), model, tmp_path / "set")
    assert (tmp_path / f"set.{suffix}").read_text() == "mine"


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    """No documents, a share without documents, and a share out of range."""
    model = data_cases.tokenizer(tmp_path)
    with pytest.raises(RequestError, match="set would have no documents"):
        build_dataset(["", ""], model, tmp_path / "set")
    with pytest.raises(RequestError, match="set_validation would have no documents"):
        build_dataset(["a"], model, tmp_path / "set", validation_share=1e-9)
    with pytest.raises(RequestError, match=r"validation share is 1\.0"):
        build_dataset(["a"], model, tmp_path / "set", validation_share=1.0)


def _truncate(suffix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / f"a.{suffix}"
        path.write_bytes(path.read_bytes()[:-6])

    return change


def _swap_index(folder: Path) -> None:
    (folder / "a.idx").write_bytes((folder / "b.idx").read_bytes())


def _break_header(folder: Path) -> None:
    path = folder / "a.idx"
    path.write_bytes(b"X" + path.read_bytes()[1:])


DAMAGE: dict[str, tuple[Callable[[Path], None], type[FlmError], str]] = {
    "truncated .bin": (_truncate("bin"), DamagedError, r"a\.bin has \d+ bytes but \d+ were written"),
    "truncated .idx": (_truncate("idx"), DamagedError, r"a\.idx has \d+ bytes but \d+ were written"),
    "truncated .json": (_truncate("json"), DamagedError, r"a\.json does not describe a dataset"),
    "index of another dataset": (_swap_index, DamagedError, r"a\.idx does not fit .*a\.bin"),
    "broken index": (_break_header, DamagedError, r"a\.idx is not the index of a dataset"),
    "no .json": (lambda folder: (folder / "a.json").unlink(), RequestError, r"a\.json is missing"),
    "no .bin": (lambda folder: (folder / "a.bin").unlink(), RequestError, r"a\.bin is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_do_not_fit_are_found(tmp_path: Path, case: str) -> None:
    """Each kind of damage is one line that names the file."""
    damage, kind, message = DAMAGE[case]
    model = data_cases.datasets(tmp_path, {"a": 6, "b": 6})
    data = DataConfig(train=[SourceConfig(path=str(tmp_path / "a"))])
    check_datasets(data, model, model.vocab_size)
    damage(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        check_datasets(data, model, model.vocab_size)
    assert "\n" not in str(caught.value)


def test_a_description_of_another_version_is_refused(tmp_path: Path) -> None:
    """A later version of the format is named."""
    data_cases.datasets(tmp_path, {"a": 2})
    replace(read_description(tmp_path / "a"), version=3).write(tmp_path / "a.json")
    with pytest.raises(RequestError, match=r"version 3, but .* version 1 or 2 is needed"):
        read_description(tmp_path / "a")


@pytest.mark.parametrize(("documents", "error"), [(2**31, RequestError), (2**31 - 1, DamagedError)])
def test_more_documents_than_can_be_numbered_are_refused_before_their_index_is_read(
    tmp_path: Path, documents: int, error: type[FlmError]
) -> None:
    """Files of the right size, and all holes: one document fewer, and it is the index that is looked at."""
    prefix = tmp_path / "huge"
    sizes = {"bin": 2 * documents, "idx": IDX_HEADER.size + 20 * documents + 8}
    for suffix, size in sizes.items():
        with file_of(prefix, suffix).open("wb") as file:
            file.truncate(size)
    ids: dict[str, Any] = {"vocab_size": 300, "tokenizer": "0" * 64, "eod": 1, "pad": 2, "sha256": "0" * 64}
    Description(2 * documents, 0, documents, bin_bytes=sizes["bin"], idx_bytes=sizes["idx"], **ids).write(
        file_of(prefix, "json")
    )
    with pytest.raises(error, match="has 2,147,483,648 documents.*build several" if error is RequestError else "index"):
        read_description(prefix)


def test_a_build_refuses_the_document_that_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "LARGEST_COUNT", 3)
    model = data_cases.tokenizer(tmp_path)
    assert build_dataset(data_cases.texts(3), model, tmp_path / "three")[str(tmp_path / "three")].documents == 3
    with pytest.raises(RequestError, match="4 documents"):
        build_dataset(data_cases.texts(4), model, tmp_path / "four")
    assert not list(tmp_path.glob("*four*"))


def test_the_tokenizer_and_the_vocabulary_have_to_fit(tmp_path: Path) -> None:
    """A dataset made with another tokenizer than the run's, or another dataset's, or with ids the model lacks."""
    model = data_cases.datasets(tmp_path, {"a": 4})
    other = data_cases.tokenizer(tmp_path, 300)
    build_dataset(data_cases.texts(4), other, tmp_path / "b")
    data = DataConfig(
        train=[SourceConfig(path=str(tmp_path / "a"))], validation=[SourceConfig(path=str(tmp_path / "b"))]
    )
    with pytest.raises(RequestError, match=r"b was made with another tokenizer .* than .*tokenizer_320\.model"):
        check_datasets(data, model)
    with pytest.raises(RequestError, match=r"a and .*b were made with different tokenizers"):
        check_datasets(data, None)
    with pytest.raises(RequestError, match=r"a has ids up to 319, but the model's vocabulary is 319"):
        check_datasets(data_cases.config(tmp_path, {"a": 1}), model, 319)
    check_datasets(data_cases.config(tmp_path, {"a": 1}), model, 320)


@pytest.mark.parametrize("change", [{"eod": 3}, {"pad": 2}, {"vocab_size": 319}])
def test_ids_that_are_not_the_tokenizers_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    """The description names its tokenizer, and what it says of its ids follows from that."""
    model = data_cases.datasets(tmp_path, {"a": 4})
    config = data_cases.config(tmp_path, {"a": 1})
    check_datasets(config, model)
    replace(read_description(tmp_path / "a"), **change).write(tmp_path / "a.json")
    with pytest.raises(DamagedError, match=r"a\.json says .*, but of its tokenizer"):
        check_datasets(config, model)


def test_unigram_entropy_equals_its_definition(tmp_path: Path) -> None:
    """Against plain Python over the ids, in nats per token and bits per byte."""
    model = data_cases.datasets(tmp_path, {"train": 30, "validation": 5})
    train, validation = ([i for ids in _read(tmp_path / name) for i in ids] for name in ("train", "validation"))
    counts, total = Counter(train), len(train) + model.vocab_size
    nats = [-math.log((counts[i] + 1) / total) for i in validation]
    entropy = unigram_entropy(tmp_path / "train", tmp_path / "validation")
    assert entropy.nats_per_token == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    size = len("".join(data_cases.texts(5, seed=1)).encode())
    assert entropy.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-12)


def test_the_command_line_makes_a_tokenizer_and_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`flm data tokenizer`, then `flm data build`; the counts are printed; a bad input is one line, status 2."""
    (tmp_path / "a.txt").write_text("".join(data_cases.texts(60)))
    text, model, out = str(tmp_path / "a.txt"), str(tmp_path / "t.model"), str(tmp_path / "set")
    assert main(["data", "tokenizer", text, "--out", model, "--vocab-size", "310"]) == 0
    assert f"310 ids, fingerprint {open_tokenizer(model).fingerprint}" in capsys.readouterr().out
    assert main(["data", "build", text, "--tokenizer", model, "--out", out, "--workers", "1"]) == 0
    made = read_description(out)
    expected = f"{out}: {made.tokens:,} tokens, {made.text_bytes:,} bytes, 1 documents\n"
    assert capsys.readouterr().out == expected
    assert main(["data", "build", text, "--tokenizer", model, "--out", out, "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error == f"flm data: {out}.bin exists: choose another name, or remove it first\n"
