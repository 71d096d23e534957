"""Where a run goes on, and the checkpoints that it does not go on from: each refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import DataConfig, LoraConfig, ModelConfig, MupConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.training.resume.start import checked_start
from tests.support.checkpoint_cases import MODEL, Noisy, edited, manifest_of, write_small


def run_at(output: Path, model: ModelConfig = MODEL) -> RunConfig:
    """A run of one stage, of which seven steps are saved."""
    stage = StageConfig(name="small", model=model, tokens=10**6, global_batch=1)
    return RunConfig(stages=[stage], data=DataConfig(sequence_length=64), output=str(output))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the run."""
    path = tmp_path_factory.mktemp("run")
    write_small(path / "checkpoints/small/step_00000007")
    return path


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("run", "does not say which model it is of"),
        ("stage", "names no stage, as those that no run has saved"),
        ("step", "names no step, as those that no run has saved"),
    ],
)
def test_a_checkpoint_that_no_run_has_saved_is_named(tmp_path: Path, left_out: str, words: str) -> None:
    path = tmp_path / "checkpoints/small/step_00000007"
    manifest = edited(manifest_of(), **{left_out: None})
    copy_checkpoint(Noisy(MODEL, 5), path, manifest)
    with pytest.raises(RequestError, match=rf"step_00000007: its manifest\.json {words}.*move it out"):
        checked_start(run_at(tmp_path))


def test_a_model_that_is_written_otherwise_is_the_same(output: Path) -> None:
    start = checked_start(run_at(output))
    assert start is not None and start.resumes and start.step == 7
    spelled = replace(MODEL, xpos_scale_base=99.0, matrix_init_std=0.5)  # neither has a part in its function
    assert checked_start(run_at(output, spelled)) == start
    spelled = replace(MODEL, head_dim=None, hidden_size=144)
    assert spelled.kv_channels == MODEL.kv_channels
    with pytest.raises(RequestError, match=r"model\.hidden_size is 144 in the run file and 54 in the checkpoint"):
        checked_start(run_at(output, spelled))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_epsilon": 1e-6}, r"model\.norm_epsilon is 1e-06 in the run file and 1e-05"),
        # The function is the same, its learning rates are not.
        (
            {"mup": MupConfig(enabled=True, base_hidden_size=54), "output_mult": 1.5},
            r"model\.mup is .*base_hidden_size=54",
        ),
        ({"lora": LoraConfig()}, r"model\.lora is .* and None in the checkpoint"),
    ],
)
def test_another_model_is_refused(output: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=rf"'small' cannot go on with another model: {words}"):
        checked_start(run_at(output, replace(MODEL, **change)))
