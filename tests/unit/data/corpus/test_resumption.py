"""Builds that were killed go on, and copies and near duplicates are left out whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from filelock import FileLock

from flm_megatron.cli.main import main
from flm_megatron.data.corpus import build as module
from flm_megatron.data.corpus.build import BuildOptions, build
from flm_megatron.data.corpus.building import encoding
from flm_megatron.data.corpus.index_file import id_dtype, write_index
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import FlmError, RequestError
from tests.support import data_cases

KILLED = """
import os, signal, sys
from pathlib import Path
from flm_megatron.data.corpus import build as module
from flm_megatron.data.corpus.building import encoding
from tests.unit.data.corpus.test_resumption import OPTIONS, texts
from flm_megatron.data.tokenizer import open_tokenizer

def dying():
    for number, text in enumerate(texts()):
        if number == 150:
            os.kill(os.getpid(), signal.SIGKILL)
        yield text

module.SAVED_EVERY_SECONDS, encoding.BATCH_CHARACTERS = 0.0, 3000
module.build(dying(), open_tokenizer(sys.argv[1]), sys.argv[2], OPTIONS)
"""
OPTIONS = BuildOptions(validation_share=0.2, exact=True, near=0.8, identity="these texts")


def texts() -> list[str]:
    """Two hundred, some of them twice, some with another word at the end, some empty."""
    some = data_cases.texts(120)
    return [*some[:100], "", *some[20:40], *(text + " end\n" for text in some[50:70]), *some[90:], *some[100:110], ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer."""
    return data_cases.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(module, "SAVED_EVERY_SECONDS", 0.0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_build_that_was_killed_goes_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """After `kill -9`: the same files as without, and what was encoded is not encoded again."""
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = build(texts(), tokenizer, tmp_path / "straight" / "set", OPTIONS)
    assert (straight.copies, straight.near) == (20 + 10 + 10, 20)
    command = [sys.executable, "-c", KILLED, str(tokenizer.path), str(tmp_path / "killed" / "set")]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".set.partial"]
    lengths = tmp_path / "killed" / ".set.partial" / "set.lengths"
    lengths.write_bytes(lengths.read_bytes() + b"torn")  # what came after the last save
    built = build(texts(), tokenizer, tmp_path / "killed" / "set", OPTIONS)
    assert 100 <= built.resumed <= 150 and built.text_bytes < 0.5 * straight.text_bytes
    assert (built.copies, built.near) == (straight.copies, straight.near)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


@pytest.mark.parametrize("renamed", [0, 2, 4, 6])
def test_a_build_killed_among_its_renames_ends(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    """Whichever of the six files have their names by then."""
    straight = build(texts(), tokenizer, tmp_path / "straight" / "set", OPTIONS)
    rename, left = Path.rename, [renamed]

    def dying(self: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(self, target)

    def dying_after_all(path: Path) -> None:
        if path == tmp_path / "killed":  # not the folder in which they are written
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        patch.setattr(module, "sync", dying_after_all)
        with pytest.raises(KeyboardInterrupt):
            build(texts(), tokenizer, tmp_path / "killed" / "set", OPTIONS)
    again = build(iter(()), tokenizer, tmp_path / "killed" / "set", OPTIONS)
    assert list(again.datasets.values()) == list(straight.datasets.values())
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_build_killed_after_its_last_document_ends(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its files are finished, but not yet known to be: nothing that it goes on from is gone by then."""
    straight = build(texts(), tokenizer, tmp_path / "straight" / "set", OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "sync_tree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        build(texts(), tokenizer, tmp_path / "killed" / "set", OPTIONS)
    again = build(texts(), tokenizer, tmp_path / "killed" / "set", OPTIONS)
    assert list(again.datasets.values()) == list(straight.datasets.values()) and again.resumed == len(texts())
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_what_a_build_of_something_else_left_is_not_gone_on_with(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def dying() -> Iterator[str]:
        yield from data_cases.texts(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(dying(), tokenizer, tmp_path / "set", BuildOptions(identity="other texts"))
    assert (tmp_path / ".set.partial" / "progress.json").exists()
    built = build(texts(), tokenizer, tmp_path / "set", OPTIONS)
    assert built.resumed == 0 and len(contents(tmp_path)) == 6


def test_another_end_of_documents_is_another_build(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying() -> Iterator[str]:
        yield from data_cases.texts(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tokenizer), "eod", property(lambda self: 7))
        build(dying(), tokenizer, tmp_path / "set", OPTIONS)
    assert build(texts(), tokenizer, tmp_path / "set", OPTIONS).resumed == 0


def test_two_builds_of_one_dataset_do_not_meet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / ".set.partial").mkdir()
    with FileLock(tmp_path / ".set.partial" / "lock"), pytest.raises(RequestError, match="built by another process"):
        build(texts(), tokenizer, tmp_path / "set", OPTIONS)


def test_errors_of_the_input_leave_nothing_and_lost_workers_what_was_saved(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def failing(error: Exception) -> Iterator[str]:
        yield from data_cases.texts(60)
        raise error

    for error, left in ((RequestError("line 61"), []), (FlmError("worker"), [".set.partial"])):
        with pytest.raises(type(error)):
            build(failing(error), tokenizer, tmp_path / "set", OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == left


@pytest.mark.parametrize("vocabulary", [300, 65499, 65500, 200_000])
def test_the_index_is_megatrons(tmp_path: Path, vocabulary: int) -> None:
    """The same bytes as its own builder writes, in the type of ids that it chooses."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = numpy.dtype(id_dtype(vocabulary))
    assert dtype == DType.optimal_dtype(vocabulary)
    lengths = [3, 1, 70_000, 2]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for length in lengths:
        builder.add_document(numpy.arange(length).astype(dtype), [length])
    builder.finalize(str(tmp_path / "theirs.idx"))
    numpy.array(lengths, "<i4").tofile(tmp_path / "lengths")
    write_index(tmp_path / "ours.idx", tmp_path / "lengths", dtype)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_the_command_line_leaves_out_copies_and_says_how_fast_it_was(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate([*data_cases.texts(5), data_cases.texts(5)[0], data_cases.texts(5)[1] + "end"]):
        (tmp_path / f"{number}.txt").write_text(text)
    out = str(tmp_path / "set")
    command = ["data", "build", str(tmp_path), "--tokenizer", tokenizer.path, "--out", out, "--workers", "1"]
    assert main([*command, "--dedup", "near"]) == 0
    said = capsys.readouterr()
    assert "5 documents" in said.out
    assert "left out: 1 copies, 1 near duplicates" in said.err and "MB/s in each of 1 processes" in said.err
    assert main([*command, "--similarity", "0.5"]) == 2
    assert "--similarity means something with --dedup near" in capsys.readouterr().err
