"""A small checkpoint on odd shapes, and the command run on it, for the tests of the checkpoint tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, MupConfig, RunConfig, StageConfig

# 331 is padded to 384 without tensor parallelism, to 512 under tensor 2: the last rank then has padding only in part.
MODEL = ModelConfig(
    num_layers=5,
    hidden_size=54,
    ffn_hidden_size=30,
    num_attention_heads=36,
    num_query_groups=6,
    head_dim=4,
    vocab_size=331,
    input_mult=0.5,
    output_mult=3.0,
    mup=MupConfig(enabled=True, base_hidden_size=27),
)


class Memory(LogicalCheckpoint):
    """Tensors in memory."""

    def __init__(self, values: dict[str, torch.Tensor], manifest: Manifest | None = None) -> None:
        self.values, self.manifest = values, manifest or Manifest()
        self.tensors = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of a region."""
        return self.values[name][region.slices if region else ()].clone()


class Noisy(InitialCheckpoint):
    """Initial weights in bf16 with masters, whose moments are not zero but drawn like weights."""

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of a region; a moment's are those of the weights' master, shifted."""
        prefix, _, parameter = name.rpartition("exp_avg.")
        if prefix or "exp_avg_sq." in name:
            parameter = name.split(".", 3)[3]
            return super().read("optimizer.state.param." + parameter, region).square() + len(name)
        return super().read(name, region)


def run_of(model: ModelConfig, **fields: Any) -> dict[str, Any]:
    """A resolved run of one stage, as plain data."""
    return run_to_dict(
        RunConfig(stages=[StageConfig(name="small", model=model)], data=DataConfig(sequence_length=64), **fields)
    )


def manifest_of(model: ModelConfig = MODEL, **fields: Any) -> Manifest:
    """The manifest of a checkpoint of `model`."""
    known = {"run": run_of(model), "stage": "small", "step": 7, "tokens": 4096, "samples": 64, "optimizer_step": 7}
    return Manifest.from_json(known | fields)


def edited(manifest: Manifest, **changes: Any) -> Manifest:
    """A manifest with other values at some of its keys; with none the key is taken out."""
    return Manifest.from_json(manifest.to_json() | changes)


def write_small(path: Path, model: ModelConfig = MODEL, **manifest: Any) -> LogicalCheckpoint:
    """Write a checkpoint with its optimizer, weights in bf16, to `path`; returns what was written."""
    checkpoint = Noisy(model, 5, optimizer=True, dtype=torch.bfloat16)
    copy_checkpoint(checkpoint, path, manifest_of(model, **manifest), chunk_bytes=9_999)
    return checkpoint


def flm_checkpoint(*arguments: object) -> int:
    """Exit status of `flm checkpoint` with these arguments, run in this process."""
    return main(["checkpoint", *map(str, arguments)])


def as_foreign(path: Path) -> None:
    """Take from a checkpoint what makes it one of ours, so that its other files can be changed by hand."""
    for name in ("manifest.json", "common.pt"):
        (path / name).unlink(missing_ok=True)


def flip(file: Path, position: int, bits: int = 16) -> None:
    """Change bits of one byte of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= bits
    file.write_bytes(data)
