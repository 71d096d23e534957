"""Runs that earlier commits saved go on as they would have then."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm_megatron.config.loader import load_run
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.training.metrics.events import ChangeEvent, read_events
from tests.fixtures import CHECKPOINT_V1, copy_of
from tests.support.layouts import relative_difference
from tests.support.runs import losses


def test_a_run_of_the_first_format_goes_on_as_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 5 to 8 have the losses, gradient norms and learning rates that the commit of its day made of them."""
    folder = copy_of(CHECKPOINT_V1, tmp_path / "run")
    expected = losses(folder / "output")
    monkeypatch.chdir(folder)
    assert train(resolve(load_run("run.yaml", []))) == 0
    ours = losses(folder / "output")
    assert [line[:2] for line in ours] == [line[:2] for line in expected] and len(ours) == 8
    assert [line[4] for line in ours] == [line[4] for line in expected]
    assert not read_events(folder / "output", ChangeEvent)
    # The bits are those of one machine; another's matrix products may round otherwise.
    assert relative_difference([line[2:4] for line in ours], [line[2:4] for line in expected]) <= 1e-5
