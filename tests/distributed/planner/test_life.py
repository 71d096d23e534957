"""What a rehearsed rank reads, sends and writes beside its steps, and what a real one does, to the region and byte."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from flm_megatron import kernels
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.lazy.adapters import WithNewAdapters
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import (
    ChatConfig,
    CheckpointConfig,
    DataConfig,
    GrowthConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    ValidationConfig,
)
from flm_megatron.planner.rehearsal.rank import rehearse_rank
from flm_megatron.planner.rehearsal.recorder import Recorder, Transfer
from tests.distributed.planner.test_rehearsal import TORCH, Sent
from tests.support.pool import Pool

SEQUENCE = 32
SMALL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=500)
LARGE = replace(SMALL, num_layers=3, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6)
Read = dict[str, tuple[int, int]]
Lived = tuple[Read, int, int, Sent, Sent, Sent, int]


class Watched(LogicalCheckpoint):
    """A checkpoint that remembers what real ranks ask of it, in any thread."""

    def __init__(self, source: LogicalCheckpoint) -> None:
        self.source, self.manifest, self.tensors = source, source.manifest, source.tensors
        self.regions, self.nbytes, self.lock = Counter[str](), Counter[str](), threading.Lock()

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """The source's values."""
        values = self.source.read(name, region)
        with self.lock:
            self.regions[name] += 1
            self.nbytes[name] += values.nbytes
        return values

    def found(self) -> Read:
        """Regions and bytes by tensor."""
        return {name: (self.regions[name], self.nbytes[name]) for name in self.regions}


def sent(transfers: list[Transfer] | tuple[Transfer, ...]) -> Sent:
    """Transfers as far as they do not depend on who looks."""
    return [(t.kind, t.group, t.nbytes, t.dtype, t.peer) for t in transfers]


def micro_batches(stage: StageConfig, world: int, packed: bool = False) -> list[dict[str, torch.Tensor]]:
    """One rank's share of a global batch."""
    ids = torch.arange(SEQUENCE).unsqueeze(0)
    batch = {"tokens": ids, "labels": ids, "position_ids": ids, "loss_mask": torch.ones(1, SEQUENCE)}
    if packed:
        batch["segments"] = (ids > 11).long()
    return [batch] * (stage.global_batch * stage.parallel.model_size // world)


def real_growth(run: RunConfig, source: Path, folder: Path, world: int) -> Lived:
    """What a real rank reads of tensors and files, draws, sends loading, behind masks and validating, and writes."""
    from flm_megatron.checkpoint.sharding.model_state import load_state, save_state
    from flm_megatron.distributed.world import layout
    from flm_megatron.growth.boundary import grown_checkpoint
    from flm_megatron.growth.grown import checkpoint as grown_module
    from flm_megatron.growth.schedule import mask_plan
    from flm_megatron.model.masks import GrowthMasks
    from flm_megatron.training.step import TrainState

    kernels.use(kernels.choose(TORCH))
    bytes_read, drawn = list[int](), list[int]()  # by several threads
    read, draw = StoredArray.read, grown_module.truncated_normal

    def counted(array: StoredArray, region: Region | None = None) -> torch.Tensor:
        values = read(array, region)
        bytes_read.append(values.nbytes)
        return values

    def counted_draw(*arguments: object, **named: object) -> torch.Tensor:
        values = draw(*arguments, **named)  # type: ignore[arg-type]
        drawn.append(values.nbytes)
        return values

    checkpoint = Watched(open_checkpoint(source))
    grown, plan = grown_checkpoint(checkpoint, run, 1, [0.0] * SMALL.num_layers)
    stage = replace(run.stages[1], model=plan.new)
    batches = micro_batches(stage, world)
    with layout(stage.parallel, timeout_s=120), mock.patch.object(grown_module, "truncated_normal", counted_draw):
        state = TrainState(stage, SEQUENCE)
        with mock.patch.object(StoredArray, "read", counted), Recorder(values=True) as recorder:
            load_state(grown, state.chunks, state.optimizer)
        loading = sent(recorder.transfers)
        masks = GrowthMasks(state.chunks, stage.model, mask_plan(plan))
        with Recorder(values=True) as recorder:
            state.train_step(batches)
            behind_masks = sent(recorder.forget())
            masks.set(1.0)
            state.train_step(batches)
            recorder.forget()
            state.validation_loss(iter([batches]))
            validating = sent(recorder.forget())
        save_state(folder / "saved", state.chunks, state.optimizer, Manifest()).wait()
        written = (folder / "saved" / f"__{dist.get_rank()}_0.distcp").stat().st_size
    return checkpoint.found(), sum(bytes_read), sum(drawn), loading, behind_masks, validating, written


def test_the_life_of_a_rank_is_that_of_a_real_one(pool: Pool, tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True, overlap_grad_reduce=True, overlap_param_gather=True)
    small = StageConfig("small", SMALL, parallel, global_batch=8, tokens=10**6, precision="bf16")
    large = replace(small, name="large", model=LARGE, growth=GrowthConfig(), validation=ValidationConfig(samples=8))
    data = DataConfig(sequence_length=SEQUENCE, validation=[SourceConfig("validation")])
    run = RunConfig(output=str(tmp_path), data=data, stages=[small, large], kernels=TORCH)
    source = tmp_path / "checkpoints" / "small" / "step_00000007"
    manifest = stage_manifest(run, 0, SMALL, StagePosition(7, 56, 1792, 7))
    copy_checkpoint(InitialCheckpoint(SMALL, 3, True, torch.bfloat16), source, manifest, chunk_bytes=2**15)
    found = pool.run(4, real_growth, run, source, tmp_path, 4)
    for rank in (0, 3):
        read, from_files, drawn, loading, behind_masks, validating, written = found[rank]
        report = rehearse_rank(run, run.stages[1], rank, 4, micro_batches=4)
        life = report.life
        assert {name: (one.regions, one.nbytes) for name, one in life.starting.tensors.items()} == read
        assert sum(one.nbytes for one in life.starting.files.values()) == from_files > 0
        assert life.starting.drawn.nbytes == drawn
        assert sent(life.starting.transfers) == loading and loading
        assert life.masked is not None and life.validation is not None
        assert sent(life.masked.transfers) == behind_masks and behind_masks
        assert sent(life.validation.transfers) == validating and validating
        assert life.saving.file_bytes == written


def real_adapters(stage: StageConfig, world: int) -> tuple[Read, Sent]:
    """What a real rank reads of the checkpoint below its new adapters, and what it sends in a step on conversations."""
    from flm_megatron.checkpoint.sharding.model_state import load_state
    from flm_megatron.distributed.world import layout
    from flm_megatron.training.step import TrainState

    kernels.use(kernels.choose(TORCH))
    base = Watched(InitialCheckpoint(replace(stage.model, lora=None), 3, True, torch.bfloat16))
    with layout(stage.parallel, timeout_s=120):
        state = TrainState(stage, SEQUENCE)
        load_state(WithNewAdapters(base, stage.model, 3), state.chunks, state.optimizer)
        with Recorder(values=True) as recorder:
            state.train_step(micro_batches(stage, world, packed=True))
        return base.found(), sent(recorder.transfers)


@pytest.mark.slow
def test_a_rehearsed_fine_tuning_of_adapters_does_what_a_real_one_does(pool: Pool) -> None:
    model = replace(SMALL, lora=LoraConfig(rank=4))
    stage = StageConfig("tuned", model, ParallelConfig(tensor=2), global_batch=4, tokens=1, precision="bf16")
    data = DataConfig(sequence_length=SEQUENCE, chat=ChatConfig())
    run = RunConfig(
        data=data, stages=[stage], kernels=TORCH, checkpoint=CheckpointConfig(initial="/nowhere/that/is/here")
    )
    for rank, (read, transfers) in enumerate(pool.run(4, real_adapters, stage, 4)):
        report = rehearse_rank(run, stage, rank, 4, micro_batches=2)
        starting = report.life.starting
        assert {name: (one.regions, one.nbytes) for name, one in starting.tensors.items()} == read
        assert not any(name.startswith("optimizer.") for name in read)
        assert sent(report.transfers) == transfers and transfers
