"""Stage boundaries crossed inside the running ranks: the bits are those of the way over the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.logical import Region
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.growth.record import change_of
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train_stages
from flm_megatron.training.resume.start import checkpoint_store, find_start
from tests.support.pool import Pool
from tests.support.runs import losses

RUN = """
output: {output}
tokenizer: {data}/tokenizer.model
data:
  sequence_length: 32
  train: [{{path: {data}/train}}]
defaults:
  global_batch: 4
  optimizer: {{lr: 3.0e-3, min_lr: 1.0e-3}}
  schedule: {{warmup_samples: 8}}
stages:
  - name: small
    model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4}}
    parallel: {{tensor: 2, pipeline: 2}}
    precision: bf16
    tokens: 256
  - name: big
    model: {{num_layers: 3, hidden_size: 48, ffn_hidden_size: 96, num_attention_heads: 6}}
    parallel: {{pipeline: 2, data: 2, distributed_optimizer: true}}
    precision: bf16
    tokens: 256
    growth: {{hidden: mask, ffn: zero, heads: mask, layers: mask, mask_steps: 1, optimizer_step: birth,
              layer_selection: distance, distance_samples: 1, certify_samples: 1,
              new_scale: trained}}
"""
WIDE = """
  - name: wide
    model: {{num_layers: 3, hidden_size: 48, ffn_hidden_size: 96, num_attention_heads: 6}}
    parallel: {{tensor: 2, data: 2, distributed_optimizer: true}}
    tokens: 256
    growth: {{certify_samples: 0}}
"""


NARROW = """
  - name: narrow
    model: {{num_layers: 2, hidden_size: 36, ffn_hidden_size: 64, num_attention_heads: 2, head_dim: 8}}
    parallel: {{tensor: 2, pipeline: 2}}
    tokens: 256
    shrink: {{samples: 1, certify_samples: 0}}
"""


def run_in(folder: Path, *overrides: str) -> RunConfig:
    """The run in a folder, resolved."""
    return resolve(load_run(folder / "run.yaml", overrides))


def unread(self: TorchDistCheckpoint, name: str, region: Region | None = None) -> torch.Tensor:
    """In place of reading from the disk."""
    raise AssertionError(f"{name} is read from {self.path}")


def both_ways(folders: dict[str, str]) -> None:
    """Train all stages over the disk, then inside the ranks."""
    for way, folder in folders.items():
        if way == "live":
            TorchDistCheckpoint.read = unread  # type: ignore[method-assign]
        run = run_in(Path(folder), "--checkpoint.live_boundaries", str(way == "live"))
        assert train_stages(run, None, find_start(run))


def test_growth_under_another_layout_has_the_bits_of_the_way_over_the_disk(
    data: Path, tmp_path: Path, pool: Pool
) -> None:
    assert crossed(RUN, ["small", "big"], data, tmp_path, pool) == ["big"]


@pytest.mark.slow
def test_another_layout_precision_and_data_size_and_a_smaller_model_too(data: Path, tmp_path: Path, pool: Pool) -> None:
    stages = ["small", "big", "wide", "narrow"]
    assert crossed(RUN + WIDE + NARROW, stages, data, tmp_path, pool) == stages[1:]


def crossed(text: str, stages: list[str], data: Path, folder: Path, pool: Pool) -> list[str]:
    """Check that a run has the bits of both ways; returns stages of which the log says that they came out of memory."""
    folders = {way: folder / way for way in ("disk", "live")}
    for output in folders.values():
        output.mkdir()
        (output / "run.yaml").write_text(text.format(data=data, output=output))
    pool.run(4, both_ways, {way: str(output) for way, output in folders.items()})
    stores = [checkpoint_store(run_in(folders[way])) for way in ("live", "disk")]
    for stage in stages:
        ours, theirs = (open_checkpoint(store.path(stage, 2)).manifest for store in stores)
        assert ours.tensors == theirs.tensors and ours.logical_hash, stage
        records = [change_of(manifest) for manifest in (ours, theirs)]  # from sources of which paths differ
        found = [record and (record.plan, record.certificate, record.source_logical_hash) for record in records]
        assert found[0] == found[1]
    assert losses(folders["live"]) == losses(folders["disk"])
    disk, live = ((folders[way] / "log.txt").read_text().splitlines() for way in ("disk", "live"))
    assert not any("loaded from the memory" in line for line in disk)
    return [line.split()[0] for line in live if "loaded from the memory of the ranks" in line]
