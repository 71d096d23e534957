"""A run whose second stage is smaller: measured, cut out and certified at the boundary, resumed with the same bits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.cli.main import main
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.record import shrinking_of
from flm_megatron.growth.shrink.boundary import resumed_shrinking
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.training.metrics.events import GrowthEvent, read_events
from flm_megatron.training.resume.start import checked_start, checkpoint_store
from tests.support.prose import prose
from tests.support.runs import losses

RUN = """
output: {output}
tokenizer: {data}/tokenizer.model
data:
  sequence_length: 32
  train: [{{path: {data}/train}}]
  validation: [{{path: {data}/validation}}]
defaults:
  global_batch: 4
  optimizer: {{lr: 3.0e-3}}
stages:
  - name: large
    model: {{num_layers: 3, hidden_size: 48, ffn_hidden_size: 96, num_attention_heads: 6, num_query_groups: 3}}
    tokens: 1024
  - name: small
    model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 2,
             head_dim: 8}}
    parallel: {{tensor: 2, sequence: true}}
    tokens: 512
    shrink: {{samples: 2, certify_samples: 2, heads: gradient}}
checkpoint: {{interval_steps: 2, keep_last: 9}}
"""


def make_run(data: Path, output: Path, *overrides: str) -> RunConfig:
    """The run above, resolved."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "test.yaml").write_text(RUN.format(data=data, output=output))
    return resolve(load_run(output / "test.yaml", overrides))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Both stages trained without a stop."""
    run = make_run(data, tmp_path_factory.mktemp("whole"))
    assert train(run) == 0
    return run


def store(run: RunConfig) -> CheckpointStore:
    """The run's checkpoints."""
    return checkpoint_store(run)


def test_the_smaller_stage_says_what_it_kept_and_what_that_cost(whole: RunConfig) -> None:
    (event,) = read_events(Path(whole.output), GrowthEvent)
    assert event.stage == "small" and event.change == "shrinking" and event.certificate is not None
    (measured,) = event.certificate.comparisons
    first = next(line for line in losses(Path(whole.output)) if line[0] == "small")
    assert measured.loss_after > 0 and not event.certificate.preserving
    assert first[2] == pytest.approx(measured.loss_after, rel=0.02), "other text, but the model that was certified"
    saved = open_checkpoint(store(whole).path("small", 2)).manifest
    record = shrinking_of(saved)
    assert record is not None and record.certificate == event.certificate and record.moments
    assert record.source_logical_hash == open_checkpoint(store(whole).path("large", 8)).manifest.logical_hash
    assert record.plan.importance_of == record.source_logical_hash and record.plan.criteria["heads"] == "gradient"
    assert saved.position.optimizer_step == 8 + 2


def test_a_smaller_stage_goes_on_with_the_same_bits(data: Path, whole: RunConfig, tmp_path: Path) -> None:
    run = make_run(data, tmp_path)
    shutil.copytree(Path(whole.output) / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(store(run).path("small", 4))
    assert train(run) == 0
    ours, theirs = (open_checkpoint(store(each).path("small", 4)).manifest for each in (run, whole))
    assert ours.logical_hash == theirs.logical_hash
    assert shrinking_of(ours) == shrinking_of(theirs)


def test_a_changed_plan_is_refused_before_anything_starts(whole: RunConfig) -> None:
    saved = open_checkpoint(store(whole).path("small", 2)).manifest
    for changes, words in (
        ({"rescale_norms": False}, "was shrunk with"),
        ({"ffn": "gradient"}, "criteria.ffn = 'activation', and the run file now gives 'gradient'"),
    ):
        stage = whole.stages[1]
        assert stage.shrink is not None
        changed = replace(stage, shrink=replace(stage.shrink, **changes))
        with pytest.raises(RequestError, match=words):
            resumed_shrinking(replace(whole, stages=[whole.stages[0], changed]), 1, saved)


def test_what_cannot_begin_is_refused_before_processes(data: Path, whole: RunConfig, tmp_path: Path) -> None:
    for overrides, words in (
        (["--stages.1.shrink.importance", str(tmp_path / "absent")], "absent: there is no such file"),
        (["--stages.1.shrink.importance", str(data / "tokenizer.model")], "not a whole safetensors file"),
    ):
        run = make_run(data, tmp_path, *overrides)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.copytree(store(whole).path("large", 8), store(run).path("large", 8))
        with pytest.raises(RequestError, match=words):
            checked_start(run)


@pytest.mark.slow
def test_flm_shrink_writes_what_any_number_of_processes_writes(
    data: Path, whole: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(prose(1)[0])
    source, run = store(whole).path("large", 8), Path(whole.output) / "test.yaml"
    measured = ["importance", str(source), str(run), "--heads", "gradient", "--out", str(tmp_path / "units")]
    assert main(measured) == 0
    command = ["shrink", str(source), str(run), "--stage", "small", "--importance", str(tmp_path / "units")]
    assert main([*command, "--out", str(tmp_path / "one"), "--certify", str(tmp_path / "text.txt")]) == 0
    assert "shrinking into small, which changes the function" in capsys.readouterr().out
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched += ["-m", "flm_megatron.cli.main", *command, "--out", str(tmp_path / "two")]
    assert subprocess.run(launched, capture_output=True, timeout=240, check=False).returncode == 0
    lone = ["shrink", str(source), "--importance", str(tmp_path / "units"), "--out", str(tmp_path / "lone")]
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "head_dim": 8}
    options = [
        word for name, size in {**shape, "num_query_groups": 2}.items() for word in (f"--model.{name}", str(size))
    ]
    assert main([*lone, *options, "--shrink.heads", "gradient"]) == 0
    hashes = {name: open_checkpoint(tmp_path / name).manifest.logical_hash for name in ("one", "two", "lone")}
    assert len(set(hashes.values())) == 1, hashes
