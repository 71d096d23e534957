"""Damage in a dataset is found: in its index before a run starts, in its ids by `flm data verify`."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from flm_megatron.cli.main import main
from flm_megatron.config.schema import SourceConfig
from flm_megatron.data.corpus import index_file
from flm_megatron.data.corpus.description import read_description
from flm_megatron.data.corpus.source_line import SourceLine
from flm_megatron.data.corpus.verify import check_indices, verify_dataset, verify_index
from flm_megatron.data.streams.cuts import Cut, Place
from flm_megatron.errors import DamagedError, FlmError
from flm_megatron.launch.preflight import resolve
from tests.support import data_cases
from tests.support.runs import make_data, make_run


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of seven documents."""
    folder = tmp_path_factory.mktemp("data")
    data_cases.datasets(folder, {"a": 7})
    return folder / "a"


def flipped(data: bytes, bit: int) -> bytes:
    """With one bit changed."""
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def test_every_flipped_bit_of_an_index_is_found(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "CHECKED_AT_ONCE", 3)
    file = prefix.with_suffix(".idx")
    whole, missed = file.read_bytes(), []
    for bit in range(8 * len(whole)):
        file.write_bytes(flipped(whole, bit))
        try:
            verify_index(prefix)
            missed.append(bit)
        except FlmError as error:
            assert str(file) in str(error)
    file.write_bytes(whole)
    assert not missed
    assert verify_dataset(prefix).documents == 7
    check_indices([SourceConfig(path=str(prefix))])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_the_command_names_the_damaged_file(prefix: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = prefix.with_suffix(suffix)
    whole = file.read_bytes()
    assert main(["data", "verify", str(prefix)]) == 0
    assert f"nothing wrong: {prefix}: " in capsys.readouterr().out
    file.write_bytes(flipped(whole, 8 * len(whole) // 2))
    try:
        assert main(["data", "verify", str(prefix)]) == 1
    finally:
        file.write_bytes(whole)
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1


def test_a_run_does_not_start_on_a_damaged_index(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = make_data(tmp_path / "data")
    _, run = make_run(data, tmp_path / "run")
    resolve(run)
    file = data / "validation.idx"
    file.write_bytes(flipped(file.read_bytes(), 8 * 40))
    with pytest.raises(FlmError, match=r"validation\.idx"):
        resolve(run)


@pytest.mark.parametrize("cut", [Cut(0, 32), Cut(0, 16, Cut(0, 32), 2)], ids=["a pass", "what was left of one"])
def test_an_id_that_the_vocabulary_does_not_have_is_met_by_name(tmp_path: Path, cut: Cut) -> None:
    """While it is read for training: a run does not hash its datasets, which may be terabytes."""
    model = data_cases.datasets(tmp_path, {"a": 12})
    config = SourceConfig(path=str(tmp_path / "a"))
    total = read_description(tmp_path / "a").tokens
    whole = SourceLine(config, Place(cut), [cut], 5, None)
    samples = range(cut.samples(total))
    before = [whole.read(cut, sample) for sample in samples]
    ids = numpy.memmap(tmp_path / "a.bin", dtype=numpy.uint16, mode="r+")
    ids[total // 2] = model.vocab_size - 1
    ids.flush()
    allowed = [whole.read(cut, sample) for sample in samples]
    ids[total // 2] = model.vocab_size
    ids.flush()
    wrong = [n for n in samples if any((allowed[n][f] != before[n][f]).any() for f in ("tokens", "labels"))]
    assert wrong
    for sample in samples:
        if sample not in wrong:
            assert torch.equal(whole.read(cut, sample)["tokens"], before[sample]["tokens"])
            continue
        words = rf"a\.bin: sample a/{cut.label}/{sample} holds the id 320, and its tokenizer has 320"
        with pytest.raises(DamagedError, match=words):
            whole.read(cut, sample)
