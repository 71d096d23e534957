"""Bad input of the checkpoint commands: one clear line, the right exit status, nothing at the destination."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.files.manifest import file_entry
from tests.support.checkpoint_cases import MODEL, flip, flm_checkpoint, run_of, write_small
from tests.unit.checkpoint.hugging_face.test_hugging_face import RunsCode

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its Hugging Face export and its Megatron-LM form, to be copied and damaged."""
    path = tmp_path_factory.mktemp("whole")
    write_small(path / "ours")
    assert flm_checkpoint("export-hf", path / "ours", path / "hf", "--shard-size", "100KB") == 0
    assert flm_checkpoint("reshard", path / "ours", path / "classic", "--format", "classic", "--tensor", 2) == 0
    return path


def edit_manifest(path: Path, **change: Any) -> None:
    """Change fields of a manifest, keeping its own checksum right."""
    manifest = json.loads((path / "manifest.json").read_text()) | change
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    checksum = f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"
    (path / "manifest.json").write_text(json.dumps(rest | {"crc32": checksum}))


def cut_short(file: Path) -> None:
    """Drop the second half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def plant(file: Path) -> None:
    """A pickle that would leave a mark beside the folder, in one without checksums."""
    (file.parent / "manifest.json").unlink()
    with file.open("wb") as stream:
        pickle.dump({"args": RunsCode(mark_of(file))}, stream)


def plant_zip(file: Path) -> None:
    """The same in a file of torch.save."""
    torch.save({"model": RunsCode(mark_of(file))}, file)


def sealed(path: Path, harm: Callable[[Path], None]) -> None:
    """Harm the metadata, and make a manifest that knows it so."""
    text = (path / "manifest.json").read_text()
    harm(path / ".metadata")
    (path / "manifest.json").write_text(text)
    files = json.loads(text)["files"]
    edit_manifest(path, files=files | {".metadata": file_entry((path / ".metadata").read_bytes()).model_dump()})


def mark_of(file: Path) -> Path:
    """Where planted code would leave its mark."""
    return next(parent for parent in file.parents if (parent / "root").exists()) / "ran"


def emptied(path: Path) -> None:
    """Take every file away."""
    for file in path.iterdir():
        file.unlink()


OTHER = run_of(type(MODEL)(**(vars(MODEL) | {"ffn_hidden_size": 32})))
CASES: list[tuple[str, str, Damage, int, str]] = [
    ("empty", "ours", emptied, 2, "is not a checkpoint"),
    ("no folder", "ours", lambda p: shutil.rmtree(p), 2, "is not a checkpoint"),
    ("metadata truncated", "ours", lambda p: cut_short(p / ".metadata"), 1, ".metadata"),
    ("metadata missing", "ours", lambda p: (p / ".metadata").unlink(), 1, ".metadata"),
    ("data truncated", "ours", lambda p: cut_short(p / "__0_0.distcp"), 1, "__0_0.distcp"),
    ("data missing", "ours", lambda p: (p / "__0_0.distcp").unlink(), 1, "__0_0.distcp"),
    ("flipped bit", "ours", lambda p: flip(p / "__0_0.distcp", 8000), 1, "__0_0.distcp: the"),
    ("checksums flipped", "ours", lambda p: flip(p / "__0_0.distcp.crc32", 1), 1, "__0_0.distcp.crc32"),
    ("common.pt flipped", "ours", lambda p: flip(p / "common.pt", 99), 1, "common.pt"),
    ("manifest missing", "ours", lambda p: (p / "manifest.json").unlink(), 1, "has no manifest.json"),
    ("newer version", "ours", lambda p: edit_manifest(p, version=99), 2, "version 99"),
    ("manifest flipped", "ours", lambda p: flip(p / "manifest.json", 90), 1, "manifest.json"),
    ("other shapes", "ours", lambda p: edit_manifest(p, run=OTHER), 2, "linear_fc1.weight has shape"),
    ("planted metadata", "ours", lambda p: plant(p / ".metadata"), 1, ".metadata"),
    ("planted and sealed", "ours", lambda p: sealed(p, plant), 2, "has no use for; not loaded"),
    ("shard missing", "hf", lambda p: next(p.glob("model-00002*")).unlink(), 1, "model-00002"),
    ("shard truncated", "hf", lambda p: cut_short(next(p.glob("model-00003*"))), 1, "model-00003"),
    ("header flipped", "hf", lambda p: flip(next(p.glob("model-00001*")), 9), 1, "model-00001"),
    ("config missing", "hf", lambda p: (p / "config.json").unlink(), 2, "is not a checkpoint"),
    ("config broken", "hf", lambda p: cut_short(p / "config.json"), 1, "config.json"),
    ("rank truncated", "classic", lambda p: cut_short(next(p.rglob("mp_rank_01/*.pt"))), 1, "mp_rank_01"),
    ("rank missing", "classic", lambda p: shutil.rmtree(next(p.rglob("mp_rank_00"))), 1, "tensor rank 0"),
    ("planted rank", "classic", lambda p: plant_zip(next(p.rglob("mp_rank_00/*.pt"))), 1, "has no use for; not loaded"),
]


@pytest.mark.parametrize(("name", "kind", "damage", "status", "message"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("command", ["reshard", "export-hf"])
def test_damage_is_told_in_one_line(
    whole: Path,
    tmp_path: Path,
    command: str,
    name: str,
    kind: str,
    damage: Damage,
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(whole / kind, tmp_path / kind)
    (tmp_path / "root").touch()
    damage(tmp_path / kind)
    assert flm_checkpoint(command, tmp_path / kind, tmp_path / "out") == status
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in message.split("|")), line
    assert not (tmp_path / "ran").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"root", kind}


def test_an_existing_destination_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    for command in ("reshard", "export-hf"):
        assert flm_checkpoint(command, whole / "ours", tmp_path / "out") == 2
        assert "out exists already" in capsys.readouterr().err
    assert flm_checkpoint("reshard", whole / "ours", tmp_path / "out", "--format", "classic") == 2
    assert flm_checkpoint("import-hf", whole / "hf", tmp_path / "out") == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


@pytest.mark.parametrize(
    "arguments",
    [["reshard"], ["reshard", "--format", "classic"], ["reshard", "--tensor", "2"], ["export-hf"]],
    ids=["merged", "classic", "layout", "hf"],
)
def test_a_disk_that_fills_up_is_told_and_leaves_nothing(
    whole: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    command, *options = arguments
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        status = flm_checkpoint(command, whole / "ours", tmp_path / "out", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_writing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    for command in ("reshard", "export-hf"):
        assert flm_checkpoint(command, whole / "ours", tmp_path / "out") == 2
        assert "5,000 free: make room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flm_checkpoint("reshard", whole / "ours", tmp_path / "out", "--tensor", 5) == 2
    assert "6 query groups cannot be split over tensor size 5" in capsys.readouterr().err
    assert flm_checkpoint("reshard", whole / "ours", tmp_path / "out", "--pipeline", 6) == 2
    assert flm_checkpoint("export-hf", whole / "ours", tmp_path / "out", "--tokenizer", tmp_path / "none") == 2
    assert "none is not there" in capsys.readouterr().err
    for wrong in (["--shard-size", "big"], ["--shard-size", "0GB"], ["--pad-vocab-to", "0"], ["--flavour", "gpt"]):
        assert flm_checkpoint("export-hf", whole / "ours", tmp_path / "out", *wrong) == 2
    assert list(tmp_path.iterdir()) == []
