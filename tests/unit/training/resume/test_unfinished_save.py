"""Waiting for a save after an error in training: long after an error of this rank, hardly after a broken collective."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.sharding.asynchronous import SaveHandle
from flm_megatron.checkpoint.torch_dist.shard_file import SourceRegion
from flm_megatron.distributed.processes import Processes
from flm_megatron.training.resume import unfinished_save
from flm_megatron.training.resume.unfinished_save import bring_to_end

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:3344")


def slow_save(path: Path, seconds: float) -> SaveHandle:
    """A checkpoint of one tensor whose reading takes `seconds`, being written in the background."""

    def read(region: Region) -> torch.Tensor:
        time.sleep(seconds)
        return torch.ones(region.sizes)

    region = Region.whole((2, 3))
    shards = {"__0_0.distcp": [SourceRegion("x", region, read)]}
    return SaveHandle(path, {"x": TensorInfo((2, 3), torch.float32)}, shards, Manifest(), Processes(), lambda: None)


def test_an_error_of_this_rank_waits_until_the_checkpoint_is_whole(tmp_path: Path) -> None:
    save = slow_save(tmp_path / "a", 0.3)
    bring_to_end(save, ValueError("planted"), 60)
    assert save.done and (tmp_path / "a" / "manifest.json").exists()
    bring_to_end(save, ValueError("planted"), 60)
    bring_to_end(None, ValueError("planted"), 60)


@pytest.mark.parametrize(
    "error", [GLOO, dist.DistBackendError("NCCL error: remote process exited")], ids=["gloo", "nccl"]
)
def test_a_broken_collective_hardly_waits(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unfinished_save, "BROKEN_S", 0.1)
    save = slow_save(tmp_path / "a", 1.0)
    bring_to_end(save, error, 60)
    assert not save.done
    assert f"WARNING: the checkpoint {tmp_path / 'a'} was under way and is lost" in capsys.readouterr().err
    save.wait()


def test_the_wait_for_others_has_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = slow_save(tmp_path / "a", 1.0)
    began = time.monotonic()
    bring_to_end(save, RuntimeError("a bug of ours"), 0.2)
    assert time.monotonic() - began < 0.8 and "not whole after 0.1 s" in capsys.readouterr().err
    save.wait()
