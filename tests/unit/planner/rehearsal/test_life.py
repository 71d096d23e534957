"""The life of a rank beside its steps: what it reads and writes, its first step behind masks, validation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.api.rehearse import rehearse
from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import split_name
from flm_megatron.checkpoint.manifest import StagePosition
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
    ShrinkConfig,
    SourceConfig,
    StageConfig,
    ValidationConfig,
)
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.planner.rehearsal.life.counted import STATES, total
from flm_megatron.planner.rehearsal.life.life import Life
from flm_megatron.planner.rehearsal.life.report import life_data, life_text
from flm_megatron.planner.rehearsal.meeting import check_meetings
from flm_megatron.planner.rehearsal.rank import RankReport, rehearse_rank
from flm_megatron.planner.rehearsal.recorder import traffic

SMALL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=500)
LARGE = replace(SMALL, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6)
PARALLEL = ParallelConfig(tensor=2, overlap_grad_reduce=True, overlap_param_gather=True)


def grown_run(output: str = "nowhere", **growth: object) -> RunConfig:
    """A run of two stages in bf16, the second grown out of the first in every width, with validation."""
    fields = {"parallel": PARALLEL, "global_batch": 16, "tokens": 10**6, "precision": "bf16"}
    small = StageConfig("small", SMALL, **fields)  # type: ignore[arg-type]
    large = StageConfig("large", LARGE, growth=GrowthConfig(**growth), **fields)  # type: ignore[arg-type]
    large = replace(large, validation=ValidationConfig(samples=40))
    data = DataConfig(sequence_length=32, validation=[SourceConfig("one"), SourceConfig("two")])
    return RunConfig(output=output, data=data, stages=[small, large])


@pytest.fixture(scope="module")
def ranks() -> list[RankReport]:
    """The four ranks of the grown stage."""
    run = grown_run()
    return [rehearse_rank(run, run.stages[1], rank, 4) for rank in range(4)]


def _state(name: str) -> str:
    return STATES[split_name(name)[0]]


def parameters(model: ModelConfig) -> int:
    """Values of all parameters."""
    sizes = 0
    for spec in parameter_specs(model).values():
        values = 1
        for size in spec.shape:
            values *= size
        sizes += values
    return sizes


def test_ranks_together_read_every_old_master_and_moment_once(ranks: list[RankReport]) -> None:
    norms = (2 * SMALL.num_layers + 1) * SMALL.hidden_size  # which both tensor ranks hold
    for state in ("masters", "first moments", "second moments"):
        held = [one for rank in ranks for one in rank.life.starting.tensors.items() if _state(one[0]) == state]
        assert sum(amount.nbytes for _, amount in held) == 4 * (parameters(SMALL) + norms)
    assert all(rank.life.starting.how == "grown from stage small" for rank in ranks)
    assert all(rank.life.starting.drawn.nbytes > 0 and rank.life.starting.where is None for rank in ranks)


def test_ranks_together_read_and_write_a_whole_checkpoint(ranks: list[RankReport]) -> None:
    whole = parameters(LARGE) * (2 + 3 * 4)
    assert sum(total(rank.life.saving.states.values()).nbytes for rank in ranks) == whole
    norms = (2 * LARGE.num_layers + 1) * LARGE.hidden_size
    read = sum(total(rank.life.resuming.tensors.values()).nbytes for rank in ranks)
    assert read == whole + norms * (2 + 3 * 4)
    assert [Path(rank.life.saving.file).name for rank in ranks] == [f"__{rank}_0.distcp" for rank in range(4)]


def test_the_first_step_is_run_behind_masks(ranks: list[RankReport]) -> None:
    masked = ranks[0].life.masked
    assert masked is not None and masked.dimensions == ("hidden", "ffn", "heads")
    assert masked.nbytes > 0 and ranks[0].most_bytes >= masked.peak.nbytes > ranks[0].peak.nbytes
    assert [t.kind for t in masked.transfers] and len(masked.transfers) == len(ranks[0].transfers)


def test_what_ranks_do_beside_their_steps_is_compared_too(ranks: list[RankReport]) -> None:
    check_meetings(ranks)
    assert ranks[0].life.validation is not None
    silent = replace(ranks[0].life, validation=replace(ranks[0].life.validation, transfers=()))
    with pytest.raises(Exception, match="deadlock"):
        check_meetings([replace(ranks[0], life=silent), ranks[1]])


def test_validation_counts_the_whole_pass_whatever_was_run(ranks: list[RankReport]) -> None:
    run, few = grown_run(), ranks[0].life.validation
    all_of_it = rehearse_rank(run, run.stages[1], 0, 4, micro_batches=8).life.validation
    assert few is not None and all_of_it is not None
    assert (few.sets, few.samples, few.batches, few.micro_batches, few.ran, all_of_it.ran) == (2, 40, 3, 8, 2, 8)
    assert few.flops == all_of_it.flops
    # Each micro-batch leaves its loss and its number of tokens.
    assert few.peak.nbytes == pytest.approx(all_of_it.peak.nbytes, rel=0.01)
    assert traffic(few.transfers, few.per_pass) == traffic(all_of_it.transfers, all_of_it.per_pass)


def test_a_rank_that_is_alone_validates_without_transfers() -> None:
    run = grown_run()
    alone = [replace(stage, parallel=ParallelConfig(), global_batch=2) for stage in run.stages]
    found = rehearse_rank(replace(run, stages=alone), alone[1], 0, 1).life.validation
    assert found is not None and found.transfers == () and found.batches == 20


def test_steps_at_which_entries_were_added_are_held_where_they_count() -> None:
    run = grown_run(optimizer_step="birth")
    found = rehearse_rank(run, run.stages[1], 0, 2)
    masters = sum(one.nbytes for name, one in found.life.resuming.tensors.items() if _state(name) == "masters")
    assert found.life.starting.offset_bytes == masters
    assert found.steady["optimizer"] == pytest.approx(4 * masters, rel=0.01)


def test_checkpoints_that_are_here_are_read_by_file_but_for_their_values(tmp_path: Path) -> None:
    run = grown_run(str(tmp_path))
    folder = tmp_path / "checkpoints" / "small" / "step_00000007"
    manifest = stage_manifest(run, 0, SMALL, StagePosition(7, 112, 3584, 7))
    copy_checkpoint(InitialCheckpoint(SMALL, 3, optimizer=True), folder, manifest)
    (shard,) = folder.glob("*.distcp")
    shard.write_bytes(bytes(shard.stat().st_size))  # of the same size, without a value
    found = rehearse(run, gpus=2, rank=0)
    first, second = (stage.reports[0].life for stage in found.stages)
    for loading in (first.resuming, second.starting):
        assert loading.where == str(folder) and loading.adam_step == 7
        assert list(loading.files) == [str(shard)]
        assert total(loading.files.values()).nbytes == total(loading.tensors.values()).nbytes
    assert first.starting.how == "started with fresh weights" and not first.starting.tensors
    assert f"grown from stage small: {folder}, Adam at step 7: __0_0.distcp" in str(found)


def test_a_growth_that_cannot_be_done_is_refused_before_anything_runs() -> None:
    run = grown_run()
    other = replace(run, stages=[replace(run.stages[0], model=replace(SMALL, bias=True)), run.stages[1]])
    with pytest.raises(RequestError, match=r"model\.bias is True in the stage before"):
        rehearse(other, gpus=2, stage="large", rank=0)


def test_a_stage_that_shrinks_is_read_through_what_it_keeps() -> None:
    """About what its own state takes, times the units around those that it keeps."""
    run = grown_run()
    large, small = run.stages[1], replace(run.stages[0], shrink=ShrinkConfig(), growth=None)
    small = replace(small, model=replace(SMALL, head_dim=LARGE.kv_channels, hidden_size=48))
    shrinking = replace(run, stages=[replace(large, growth=None), small])
    found = rehearse_rank(shrinking, small, 0, 2).life
    assert found.starting.how == "shrunk from stage large"
    read, own = (total(one.tensors.values()).nbytes for one in (found.starting, found.resuming))
    assert own < read < 5 * own


def test_life_is_in_the_report_and_in_the_plain_data(ranks: list[RankReport]) -> None:
    life: Life = ranks[0].life
    text, data = life_text(life), json.loads(json.dumps(life_data(life)))
    for words in ("grown from stage small", "resumed from a checkpoint of large", "hidden, ffn, heads masked"):
        assert words in text
    assert "validation on 40 samples of each of 2 sets: 3 x 8 micro-batches (2 run)" in text
    assert data["starting"]["states"]["masters"]["nbytes"] > 0 and data["starting"]["transfers"]
    assert data["validation"]["transfers"][-1] == {"kind": "all-reduce", "ranks": 4, "count": 3, "bytes": 96}


def tuned_run(initial: str, **fields: object) -> RunConfig:
    """A fine-tuning of two stages on packed conversations."""
    first = StageConfig("first", SMALL, PARALLEL, global_batch=8, tokens=1, precision="bf16")
    stages = [replace(first, **fields), replace(first, name="second", **fields)]  # type: ignore[arg-type]
    data = DataConfig(sequence_length=32, chat=ChatConfig())
    return RunConfig(output="nowhere", data=data, stages=stages, checkpoint=CheckpointConfig(initial=initial))


def test_adapters_are_rehearsed_over_frozen_weights() -> None:
    run = tuned_run("nowhere", model=replace(SMALL, lora=LoraConfig(rank=4)))
    first, second = (stage.reports[0] for stage in rehearse(run, gpus=2, rank=0).stages)
    assert first.life.starting.how == "started from checkpoint.initial"
    assert second.life.starting.how == "started from stage first"
    assert {_state(name) for name in first.life.starting.tensors} == {"weights"}
    adapters = [name for name in second.life.starting.tensors if "lora" in name]
    assert len(adapters) == 4 * 8  # weights, masters and two moments of both factors of four matrices
    assert first.life.starting.drawn.nbytes > 0 == second.life.starting.drawn.nbytes
    assert first.steady["gradients"] < 0.2 * first.steady["weights"]


def test_the_model_of_a_fine_tuning_comes_with_its_checkpoint(tmp_path: Path) -> None:
    run = tuned_run("nowhere", model=ModelConfig())
    with pytest.raises(RequestError, match=r"stage 'first': checkpoint\.initial nowhere is not on this machine: state"):
        rehearse(run, gpus=2, rank=0)
    with pytest.raises(RequestError, match=r"model\.lora goes with neither"):
        rehearse(tuned_run("nowhere", trainable="half", model=replace(SMALL, lora=LoraConfig())), gpus=2, rank=0)
    write_hugging_face(InitialCheckpoint(SMALL, 3), SMALL, tmp_path / "base", ExportOptions())
    run = replace(run, checkpoint=CheckpointConfig(initial=str(tmp_path / "base")))
    found = rehearse(run, gpus=2, stage="first", rank=0)
    starting = found.stages[0].reports[0].life.starting
    assert starting.where == str(tmp_path / "base") and starting.adam_step == 0
    assert list(starting.files) == [str(tmp_path / "base" / "model.safetensors")]
    assert total(starting.files.values()).nbytes == total(starting.tensors.values()).nbytes > 0
