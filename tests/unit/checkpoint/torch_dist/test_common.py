"""What Megatron-LM keeps beside tensors: a file of its own, or from megatron-core 0.19 on a record among them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.manifest import StagePosition
from flm_megatron.checkpoint.torch_dist.common import COMMON, RECORD
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.errors import DamagedError

STATE = {"iteration": 7, "optimizer": {"optimizer": {"param_groups": [{"step": torch.tensor(5)}, {"step": 5}]}}}


class Planted:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def save(path: Path, **entries: object) -> Path:
    """A folder as torch writes it, with one tensor and these entries."""
    path.mkdir()
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = DefaultSavePlanner(flatten_state_dict=False)
        dcp.save({"weight": torch.ones(3), **entries}, checkpoint_id=path, planner=planner, no_dist=True)
    return path


@pytest.mark.parametrize("kept", [[STATE], STATE], ids=["in a list, as the engine does", "by itself"])
def test_a_record_among_the_tensors_says_where_the_run_was(tmp_path: Path, kept: object) -> None:
    checkpoint = TorchDistCheckpoint(save(tmp_path / "c", **{RECORD: kept}))
    assert not (tmp_path / "c" / COMMON).exists()
    assert checkpoint.manifest.position == StagePosition(7, optimizer_step=5)
    assert set(checkpoint.tensors) == {"weight"} and recorded_model(checkpoint) is None


def test_the_file_of_its_own_comes_first(tmp_path: Path) -> None:
    path = save(tmp_path / "c", **{RECORD: [STATE]})
    torch.save({"iteration": 3}, path / COMMON)
    assert TorchDistCheckpoint(path).manifest.position.step == 3


def test_a_folder_with_neither_knows_no_position(tmp_path: Path) -> None:
    assert TorchDistCheckpoint(save(tmp_path / "c")).manifest.position == StagePosition()
    assert TorchDistCheckpoint(save(tmp_path / "d", other=["x"])).common_state() is None


def test_a_record_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "c", **{RECORD: [{"iteration": Planted(tmp_path / "ran")}]})
    with pytest.raises(DamagedError):
        TorchDistCheckpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_record_that_is_cut_off_or_gone_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path / "c", **{RECORD: [STATE]})
    (shard,) = path.glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DamagedError):
        TorchDistCheckpoint(path)
    shard.unlink()
    with pytest.raises(DamagedError, match="is missing"):
        TorchDistCheckpoint(path)
