"""A run whose checkpoints were harmed: it goes on from an older one that is whole, or stops; it never starts over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flm_megatron.checkpoint.store import CheckpointStore
from tests.support.checkpoint_cases import flip
from tests.support.runs import flm, losses, make_run

HALF = ("--checkpoint.interval_steps", "2", "--checkpoint.keep_last", "9")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run file and the output of a run of eight steps with four checkpoints."""
    output = tmp_path_factory.mktemp("whole")
    source, _ = make_run(data, output, *HALF)
    assert (result := flm("train", source)).returncode == 0, result.stderr
    return source, output


def copied(whole: tuple[Path, Path], folder: Path) -> tuple[Path, Path, CheckpointStore]:
    """A copy of the run, with its run file and its checkpoints."""
    output = folder / "run"
    shutil.copytree(whole[1], output)
    source = output / "test.yaml"
    source.write_text(source.read_text().replace(str(whole[1]), str(output)))
    return source, output, CheckpointStore(output / "checkpoints")


def tree(output: Path) -> dict[Path, bytes]:
    """All files with what they hold."""
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != "run.yaml"}


def hash_of(store: CheckpointStore) -> object:
    """Of weights, masters and moments of the newest checkpoint."""
    from flm_megatron.checkpoint.opening import open_checkpoint

    path = store.latest(["small"])
    assert path is not None
    return open_checkpoint(path).manifest.logical_hash


def test_changed_bytes_are_found_and_the_checkpoint_before_is_used(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, output, store = copied(whole, tmp_path)
    newest = store.path("small", 8)
    flip(newest / "__1_0.distcp", (newest / "__1_0.distcp").stat().st_size // 2)
    shutil.rmtree(store.path("small", 6))
    result = flm("train", source, "--stages.0.tokens", "1280")
    assert result.returncode == 0, result.stderr
    assert "__1_0.distcp" in result.stderr and "have changed since they were written" in result.stderr
    log = (output / "log.txt").read_text()
    assert "WARNING: going on from" in log and "step_00000004" in log and "__1_0.distcp" in log
    assert [line[1] for line in losses(output)] == list(range(1, 11))
    assert losses(output)[:4] == losses(whole[1])[:4]
    assert [path.name for path in store.newest("small")][:2] == ["step_00000010", "step_00000008.1"]


def test_going_on_from_an_older_checkpoint_ends_with_the_same_bits(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, output, store = copied(whole, tmp_path)
    shutil.rmtree(store.path("small", 8))
    flip(store.path("small", 6) / "common.pt", 200)
    result = flm("train", source)
    assert result.returncode == 0, result.stderr
    assert "common.pt" in (output / "log.txt").read_text()
    assert losses(output) == losses(whole[1])
    assert hash_of(store) == hash_of(CheckpointStore(whole[1] / "checkpoints"))


@pytest.mark.parametrize(
    ("harm", "status", "words"),
    [("all damaged", 1, "none of the 4 checkpoints"), ("newer version", 2, "version 99")],
)
def test_a_run_that_cannot_go_on_stops_and_leaves_everything(
    whole: tuple[Path, Path], tmp_path: Path, harm: str, status: int, words: str
) -> None:
    source, output, store = copied(whole, tmp_path)
    for path in store.newest("small"):
        if harm == "all damaged":
            (path / ".metadata").unlink()
        else:
            text = (path / "manifest.json").read_text()
            (path / "manifest.json").write_text(text.replace('"version": 1', '"version": 99'))
    before = tree(output)
    result = flm("train", source, "--stages.0.tokens", "1280")
    assert result.returncode == status and words in result.stderr.splitlines()[-1], result.stderr
    assert tree(output) == before


def test_only_a_flag_begins_anew_and_it_removes_nothing(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, store = copied(whole, tmp_path)
    for path in store.newest("small"):
        (path / ".metadata").unlink()
    metrics = (output / "metrics.jsonl").read_bytes()
    result = flm("train", source, "--start-anew")
    assert result.returncode == 0, result.stderr
    assert losses(output) == losses(whole[1])
    assert (output / "metrics.jsonl.before-1").read_bytes() == metrics
    assert len(list((output / "checkpoints.before-1" / "small").iterdir())) == 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refused = flm("train", source, "--start-anew")
    assert refused.returncode == 2 and "without a launcher" in refused.stderr
