"""Runs that earlier commits saved go on as they would have then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.loader import load_run
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.training.metrics.events import ChangeEvent, read_events
from tests.fixtures import CHECKPOINT_V1, ENGINE_0_19, copy_of
from tests.support.layouts import relative_difference
from tests.support.runs import losses

SAVED = "checkpoints/small/step_00000004"


@pytest.mark.parametrize("fixture", [CHECKPOINT_V1, ENGINE_0_19], ids=["format 1, engine 0.16.1", "engine 0.19.2"])
def test_a_run_goes_on_as_it_did(fixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 5 to 8 have the losses, gradient norms and learning rates that commit and engine of that day made of them.

    The tests run under either engine, so that each goes on from what the other has saved.
    """
    folder = copy_of(fixture, tmp_path / "run")
    expected = losses(folder / "output")
    monkeypatch.chdir(folder)
    assert train(resolve(load_run("run.yaml", []))) == 0
    ours = losses(folder / "output")
    assert [line[:2] for line in ours] == [line[:2] for line in expected] and len(ours) == 8
    assert [line[4] for line in ours] == [line[4] for line in expected]
    assert not read_events(folder / "output", ChangeEvent)
    # The bits are those of one machine; another's matrix products may round otherwise.
    assert relative_difference([line[2:4] for line in ours], [line[2:4] for line in expected]) <= 1e-6


def test_both_engines_train_alike() -> None:
    """The same run from its first step on: its losses, and the tensors of the checkpoints of step 4, bit for bit."""
    assert losses(CHECKPOINT_V1 / "output") == losses(ENGINE_0_19 / "output")
    saved = [open_checkpoint(fixture / "output" / SAVED) for fixture in (CHECKPOINT_V1, ENGINE_0_19)]
    assert saved[0].tensors == saved[1].tensors and saved[0].has_optimizer()
    for name in saved[0].tensors:
        assert torch.equal(saved[0].read(name), saved[1].read(name)), name
