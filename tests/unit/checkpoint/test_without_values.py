"""Checkpoints read without values: what would be read is told, and no file is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.lazy.generator import truncated_normal
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.checkpoint.without_values import without_values
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import DamagedError

WEIGHT = "decoder.layers.mlp.linear_fc2.weight"


def test_an_array_of_a_file_that_is_not_there_can_be_stood_for() -> None:
    array, told = StoredArray(Path("nowhere"), 0, (8, 4), torch.bfloat16), []
    with without_values(lambda file, nbytes: told.append((file, nbytes))):
        values = array.read(Region((2, 0), (3, 4)))
    assert values.shape == (3, 4) and values.dtype == torch.bfloat16
    assert told == [(Path("nowhere"), 24)]
    with pytest.raises(DamagedError):
        array.read()


def test_values_that_would_be_drawn_are_in_no_file() -> None:
    region, told = Region((1, 0), (2, 3)), []
    with without_values(lambda file, nbytes: told.append((file, nbytes))):
        assert truncated_normal(1, "name", (4, 3), region, 0.02).shape == (2, 3)
    assert told == [(None, 24)]
    assert truncated_normal(1, "name", (4, 3), region, 0.02).abs().max() > 0 and len(told) == 1


def test_a_stored_checkpoint_tells_each_file_and_reads_none(tmp_path: Path) -> None:
    model = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, vocab_size=100)
    copy_checkpoint(InitialCheckpoint(model, 1), tmp_path / "saved", chunk_bytes=4096)
    for file in (tmp_path / "saved").glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    checkpoint, told = open_checkpoint(tmp_path / "saved"), []
    region = Region((0, 3, 4), (2, 20, 8))
    with without_values(lambda file, nbytes: told.append((file, nbytes))):
        assert checkpoint.read(WEIGHT, region).shape == region.sizes
    assert len(told) > 1 and sum(nbytes for _, nbytes in told) == region.numel * 4
    assert {file for file, _ in told} == {tmp_path / "saved" / "__0_0.distcp"}
    with pytest.raises(DamagedError):
        checkpoint.read(WEIGHT, region)
