"""The best layouts of a search rehearsed: whether they run, fit and do what was planned of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flm_megatron.cli.main import main
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.errors import FlmError
from flm_megatron.planner.machine import find_machine
from flm_megatron.planner.rehearsal.searched import layouts_data, layouts_text, rehearse_candidates
from flm_megatron.planner.search import describe, search

MODEL = ModelConfig(num_layers=2, hidden_size=256, ffn_hidden_size=688, num_attention_heads=4, vocab_size=2000)
STAGE = StageConfig(model=MODEL, global_batch=8, micro_batch=1, precision="bf16", tokens=10**6, name="small")
RUN = RunConfig(data=DataConfig(sequence_length=128), stages=[STAGE])
A800 = find_machine("a800")


def test_the_best_layouts_run_and_fit_as_planned() -> None:
    candidates = search(STAGE, 128, A800, 2).candidates
    (found,) = rehearse_candidates(RUN, STAGE, candidates[:1], A800, workers=1)
    assert found.layout == describe(candidates[0].work)
    assert found.fits and found.needed_gib == pytest.approx(candidates[0].memory_gib, rel=0.02)
    assert not any(check.differing_flops or check.differing_traffic for check in found.checks)
    line = layouts_text([found]).splitlines()[-1]
    assert line.startswith(found.layout) and line.split()[-2:] == ["equal", "equal"]
    small = replace(found, memory_gib=found.needed_gib / 2)
    assert not small.fits and layouts_data([small])[0]["fits"] is False


def test_a_layout_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise FlmError("no way")

    (candidate,) = search(STAGE, 128, A800, 2).candidates[:1]
    monkeypatch.setattr("flm_megatron.planner.rehearsal.searched.rehearse_roles", fails)
    with pytest.raises(FlmError, match=f"^{describe(candidate.work)}: no way$"):
        rehearse_candidates(RUN, STAGE, [candidate], A800)


def test_a_search_shows_what_was_rehearsed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_to_dict(RUN)))
    command = ["plan", str(file), "--gpu", "a800", "--gpus", "2", "--search", "--top", "1", "--verify"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "Stage small\nRehearsed: the most that a rank held" in text and "equal" in text
