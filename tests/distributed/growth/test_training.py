"""Training on from a growth: as from the written checkpoint, with step offsets through a resume, on many processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.schema import GrowthConfig, ParallelConfig, ShrinkConfig, StageConfig
from flm_megatron.config.schema.stage import Precision
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.grown.entries import load_entries, set_added_lr_mult
from flm_megatron.growth.offline import write_changed
from flm_megatron.growth.plan import make_plan
from flm_megatron.growth.record import change_of
from flm_megatron.growth.schedule import lr_multipliers
from flm_megatron.growth.shrink.checkpoint import ShrunkCheckpoint
from flm_megatron.growth.shrink.choice import make_shrink_plan
from flm_megatron.growth.trained_scale import trained_scale
from flm_megatron.model.parameters import parameter_count
from tests.distributed.growth.test_engine import NEW, OLD, plan_of
from tests.support.growth_cases import growth, trained
from tests.support.layouts import SEQUENCE, STAGE, relative_difference, take_steps
from tests.support.pool import Pool
from tests.support.shrink_cases import drawn_importance

MANIFEST = Manifest(position=StagePosition(0, 0, 0, 40, "big"))
BOTH = ParallelConfig(tensor=2, pipeline=2, sequence=True)
WRITTEN = ("zero", "clone", "shrink", "trained", "smaller")


def grown(operator: str = "zero", precision: Precision = "fp32", step_offset: bool = False) -> GrownCheckpoint:
    """A source with moments, grown in every dimension."""
    source = trained(OLD, torch.bfloat16 if precision == "bf16" else torch.float32, optimizer=True)
    if operator == "trained":
        asked = growth("mask", new_scale="trained", optimizer_state="grow")
        scale = trained_scale(source, OLD, asked, Processes())
        return GrownCheckpoint(source, make_plan(OLD, NEW, asked, seed=11, stage="big", trained=scale), MANIFEST)
    plan = replace(plan_of(operator), optimizer_step="birth" if step_offset else "keep")
    return GrownCheckpoint(source, plan, MANIFEST)


def smaller() -> ShrunkCheckpoint:
    """The old model cut out of a source of the new one, with moments."""
    source = trained(NEW, torch.float32, optimizer=True)
    plan = make_shrink_plan(NEW, OLD, ShrinkConfig(), drawn_importance(NEW), "big")
    return ShrunkCheckpoint(source, plan, MANIFEST)


def changed(how: str) -> GrownCheckpoint | ShrunkCheckpoint:
    """One of WRITTEN."""
    return smaller() if how == "smaller" else grown(how)


def stage_of(checkpoint: GrownCheckpoint, parallel: ParallelConfig, precision: Precision = "fp32") -> StageConfig:
    """The stage that trains a grown checkpoint."""
    return replace(STAGE, model=checkpoint.plan.new, parallel=parallel, precision=precision)


def written_hashes(path: Path) -> list[str]:
    """Write a checkpoint of each of WRITTEN on all processes of the world (of this one alone without a world)."""
    return [write_changed(changed(each), path / each, Processes()).logical_hash for each in WRITTEN]


def test_grown_and_shrunk_checkpoints_are_the_same_bits_for_any_number_of_processes(pool: Pool, tmp_path: Path) -> None:
    alone = written_hashes(tmp_path / "1")
    assert pool.run(3, written_hashes, tmp_path / "3") == [alone] * 3
    for how in WRITTEN:
        written, checkpoint = open_checkpoint(tmp_path / "3" / how), changed(how)
        assert dict(written.tensors) == dict(checkpoint.tensors)
        assert all(torch.equal(written.read(name), checkpoint.read(name)) for name in checkpoint.tensors)
        record = change_of(written.manifest)
        assert record is not None and record.plan == checkpoint.plan


def trained_both_ways(path: Path, parallel: ParallelConfig, precision: Precision) -> Any:
    """Ten steps from the checkpoint and from the written checkpoint, and the hashes of what they end at."""
    from flm_megatron.checkpoint.sharding.model_state import load_state, save_state
    from flm_megatron.distributed.world import layout
    from flm_megatron.training.step import TrainState

    opened = grown("zero", precision)
    write_changed(opened, path / "grown", Processes())
    results = []
    for name, checkpoint in (("view", opened), ("written", open_checkpoint(path / "grown"))):
        with layout(parallel, timeout_s=120):
            state = TrainState(stage_of(opened, parallel, precision), SEQUENCE)
            load_state(checkpoint, state.chunks, state.optimizer)
            losses = take_steps(state, range(10))
            save_state(path / name, state.chunks, state.optimizer, MANIFEST).wait()
            results.append((losses, open_checkpoint(path / name).manifest.logical_hash))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_from_the_view_is_training_from_the_written_checkpoint(
    pool: Pool, tmp_path: Path, precision: Precision
) -> None:
    for checkpoint, written in pool.run(BOTH.model_size, trained_both_ways, tmp_path, BOTH, precision):
        assert checkpoint == written
        assert len({loss for loss, _ in checkpoint[0]}) == 10


FASTER = GrowthConfig(new_lr_mult=4.0, lr_mult_steps=6)


def run_by_entry(
    path: Path, parallel: ParallelConfig, first: int, last: int, birth: bool, settings: GrowthConfig
) -> Any:
    """Steps `first` to `last` from the growth, or from what was saved at `first`; saves at `last`."""
    from flm_megatron.checkpoint.sharding.model_state import load_state, save_state
    from flm_megatron.distributed.world import layout
    from flm_megatron.training.step import TrainState

    opened = grown(step_offset=birth)
    checkpoint = open_checkpoint(path / str(first)) if first else opened
    with layout(parallel, timeout_s=120):
        state = TrainState(replace(stage_of(opened, parallel), growth=settings), SEQUENCE)
        load_state(checkpoint, state.chunks, state.optimizer)
        load_entries(checkpoint, state.stage, state.chunks, state.optimizer)
        losses = []
        for step in range(first, last):
            set_added_lr_mult(state.optimizer, lr_multipliers(settings, opened.plan, step)[1])
            losses += take_steps(state, range(step, step + 1))
        position = StagePosition(last, 0, 0, 40 + last, "big")
        manifest = Manifest(position=position, growth=checkpoint.manifest.growth)
        save_state(path / str(last), state.chunks, state.optimizer, manifest).wait()
    return losses


@pytest.mark.slow
def test_ages_and_rates_of_entries_give_the_same_run_under_another_layout_and_after_a_resume(
    pool: Pool, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    expected = pool.run(1, run_by_entry, whole, ParallelConfig(), 0, 8, True, FASTER)[0]
    first = pool.run(4, run_by_entry, halves, BOTH, 0, 4, True, FASTER)[0]
    second = pool.run(2, run_by_entry, halves, ParallelConfig(data=2), 4, 8, True, FASTER)[0]
    assert relative_difference(first + second, expected) <= 1e-5
    for number, (birth, settings) in enumerate([(False, FASTER), (True, GrowthConfig())]):
        without = pool.run(1, run_by_entry, tmp_path / str(number), ParallelConfig(), 0, 4, birth, settings)[0]
        assert relative_difference(without, expected[:4]) > 1e-4


def added_entries(parallel: ParallelConfig) -> tuple[int, list[str]]:
    """How many entries of this rank's share count as added, and why another AdamW is refused."""
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.optimizer import initialise_state, parts
    from flm_megatron.training.step import TrainState

    refusals = []
    with layout(parallel, timeout_s=120):
        checkpoint = grown()
        state = TrainState(replace(stage_of(checkpoint, parallel), growth=FASTER), SEQUENCE)
        initialise_state(state.optimizer)
        load_entries(checkpoint, state.stage, state.chunks, state.optimizer)
        (part,) = parts(state.optimizer)
        count = sum(int(held["added"].sum()) for held in part.optimizer.state.values() if "added" in held)
        part.optimizer = torch.optim.AdamW(part.optimizer.param_groups)
        for each, settings in ((checkpoint, FASTER), (grown(step_offset=True), GrowthConfig())):
            with pytest.raises(RequestError) as refused:
                load_entries(each, replace(state.stage, growth=settings), state.chunks, state.optimizer)
            refusals.append(str(refused.value))
    return count, refusals


def test_every_added_entry_is_told_once_and_only_to_our_adamw(pool: Pool) -> None:
    plan = grown().plan
    ranks = pool.run(2, added_entries, ParallelConfig(data=2))
    assert sum(count for count, _ in ranks) == parameter_count(plan.new) - parameter_count(plan.old)
    of_rate, of_age = ranks[0][1]
    assert of_rate == (
        "growth.new_lr_mult is given, but torch.optim.adamw.AdamW has one learning rate for old and new entries: use "
        "growth.lr_mult, or train without Transformer Engine and Apex"
    )
    assert of_age.startswith("growth.optimizer_step is `birth`, which torch.optim.adamw.AdamW cannot count")
