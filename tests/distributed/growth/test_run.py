"""A run that grows: it goes on exactly where it stopped inside a mask, and is refused when its plan or loss changes."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from flm_megatron.api.train import train as train_branch
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import FlmError
from flm_megatron.evaluation.report.history import read_history
from flm_megatron.growth.boundary import saved_mask_value, saved_opening, saved_plan
from flm_megatron.growth.record import growth_of
from flm_megatron.launch.branch import decay_branch
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.optim.learning_rate import learning_rate
from flm_megatron.training.metrics.events import GrowthEvent, GrowthHealthEvent, read_events
from flm_megatron.training.resume.start import checkpoint_store
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
  optimizer: {{lr: 3.0e-3, min_lr: 1.0e-3}}
  schedule: {{kind: wsd, boundary: rewarm, warmup_samples: 12, wsd_decay_fraction: 0.2}}
stages:
  - name: small
    model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4}}
    tokens: 512
  - name: big
    model: {{num_layers: 3, hidden_size: 48, ffn_hidden_size: 96, num_attention_heads: 6}}
    parallel: {{tensor: 2, sequence: true}}
    tokens: 1024
    growth: {{hidden: mask, ffn: zero, heads: mask, layers: mask, mask_steps: 5, layer_selection: distance,
              optimizer_step: birth, rejuvenate: 0.5, lr_mult: 1.5, new_lr_mult: 2, lr_mult_steps: 3}}
checkpoint: {{interval_steps: 3, keep_last: 9}}
logging: {{growth_health: 4}}
"""


def make_run(data: Path, output: Path, *overrides: str) -> RunConfig:
    """The run above, resolved."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "test.yaml").write_text(RUN.format(data=data, output=output))
    return resolve(load_run(output / "test.yaml", overrides))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """Output and run file of both stages trained without a stop."""
    output = tmp_path_factory.mktemp("whole")
    run = make_run(data, output)
    with redirect_stdout(StringIO()) as said:
        assert train(replace(run, checkpoint=replace(run.checkpoint, live_boundaries=True))) == 0
    assert said.getvalue().count("live_boundaries is not used: without torchrun") == 1
    return output, run


def test_the_boundary_is_certified_and_the_learning_rate_is_the_run_files(whole: tuple[Path, RunConfig]) -> None:
    output, run = whole
    big = [line for line in losses(output) if line[0] == "big"]
    assert [line[1] for line in big] == list(range(1, 9))
    assert big[0][4] == 1.5 * learning_rate((4 + 1) * 4 * 32, run, 1) == 1.5 * 1e-3
    (growth,) = read_events(output, GrowthEvent)
    assert growth.certificate
    (measured,) = growth.certificate.comparisons
    assert measured.loss_change <= 1e-5
    assert len(growth.distances) == 2 and all(0 < distance < 1 for distance in growth.distances)
    manifest = open_checkpoint(checkpoint_store(run).path("big", 3)).manifest
    record = growth_of(manifest)
    assert saved_mask_value(manifest) == 0.6 and record is not None and record.certificate == growth.certificate


def test_old_and_new_entries_are_measured_at_the_boundary_and_every_n_steps(whole: tuple[Path, RunConfig]) -> None:
    lines = read_events(whole[0], GrowthHealthEvent)
    assert [(line.stage, line.step) for line in lines] == [("big", 1), ("big", 4), ("big", 8)]
    first, middle, _ = (line.parts["layer_000"] for line in lines)
    assert first["update_old"] > 0 and first["update_new"] < middle["update_new"], "new entries are behind masks"
    copied = [
        name for name, part in lines[0].parts.items() if name.startswith("layer") and "weight_norm_old" not in part
    ]
    assert len(copied) == 1
    assert lines[0].parts[copied[0]]["distance_l2"] < 1e-6 < lines[-1].parts[copied[0]]["distance_l2"]


def test_a_run_stopped_inside_a_mask_goes_on_with_the_same_bits(
    data: Path, whole: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    run = make_run(data, tmp_path)
    _copy_until(whole[0] / "checkpoints", tmp_path / "checkpoints", "step_00000003")
    assert train(run) == 0
    ours, theirs = (open_checkpoint(checkpoint_store(r).path("big", 8)).manifest for r in (run, whole[1]))
    assert ours.logical_hash == theirs.logical_hash
    assert saved_plan(ours) == saved_plan(theirs)
    expected = [line for line in losses(whole[0]) if line[0] == "big" and line[1] > 3]
    assert losses(tmp_path) == expected


def _files(run: RunConfig) -> dict[Path, bytes]:
    """What lies in the output of a run, but for its branches."""
    output = Path(run.output)
    found = [path for path in output.rglob("*") if path.is_file() and output / "branches" not in path.parents]
    return {path: path.read_bytes() for path in found}


def test_a_branch_inside_a_mask_has_the_bits_of_a_run_written_to_decay_there(
    data: Path, whole: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    trunk, before = whole[1], _files(whole[1])
    assert train_branch(trunk, branch="decay@896") == 0  # after 4 + 3 of the trunk's 4 + 8 steps
    assert _files(trunk) == before
    branch = decay_branch(trunk, "decay@896")
    assert losses(Path(branch.output))[:7] == losses(whole[0])[:7]
    written = make_run(data, tmp_path, "--stages.1.tokens", "640", "--defaults.schedule.wsd_decay_fraction", str(2 / 9))
    _copy_until(whole[0] / "checkpoints", tmp_path / "checkpoints", "step_00000003")
    assert train(written) == 0
    assert losses(tmp_path) == losses(Path(branch.output))[7:]
    assert [rate for *_, rate in losses(tmp_path)] == pytest.approx([2e-3, 1e-3])
    ours, theirs = (open_checkpoint(checkpoint_store(run).path("big", 5)).manifest for run in (branch, written))
    assert ours.logical_hash == theirs.logical_hash
    assert ours.position == theirs.position and saved_plan(ours) == saved_plan(theirs)
    report = read_history(Path(branch.output))
    assert report.boundaries[0][1] == "big" and report.steps[-1][0].tokens == 1152 and "big" in report.certificates


@pytest.mark.slow
def test_a_branch_that_was_stopped_goes_on_with_the_same_bits(
    data: Path, whole: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    trunk = make_run(data, tmp_path, "--checkpoint.interval_steps", "1")
    _copy_until(whole[0] / "checkpoints", tmp_path / "checkpoints", "step_00000003")
    assert train_branch(trunk, branch="decay@896") == 0
    branch = decay_branch(trunk, "decay@896")
    whole_branch, last = losses(Path(branch.output)), checkpoint_store(branch).path("big", 5)
    hashed = open_checkpoint(last).manifest.logical_hash
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "checkpoints")
    assert train_branch(trunk, branch="decay@896") == 0
    assert losses(Path(branch.output)) == whole_branch and len(whole_branch) == 2
    assert open_checkpoint(last).manifest.logical_hash == hashed


@pytest.mark.slow
def test_a_run_begins_without_layers(data: Path, tmp_path: Path) -> None:
    run = make_run(
        data, tmp_path, "--stages.0.model.num_layers", "0", "--stages.1.growth.layers", "zero",
        "--stages.1.growth.new_lr_mult", "0.5",
    )  # fmt: skip
    assert train(run) == 0
    assert [line[0] for line in losses(tmp_path)] == ["small"] * 4 + ["big"] * 8
    (growth,) = read_events(tmp_path, GrowthEvent)
    assert growth.certificate and growth.certificate.comparisons[0].loss_change <= 1e-6
    (health, *_) = read_events(tmp_path, GrowthHealthEvent)
    assert {"layer_000", "layer_001", "layer_002"} < set(health.parts)


def _copy_until(source: Path, target: Path, last: str) -> None:
    """The checkpoints of a run that was killed right after `last` of its second stage."""
    shutil.copytree(source / "small", target / "small")
    shutil.copytree(source / "big" / last, target / "big" / last)


def test_a_changed_plan_is_refused_on_resume(whole: tuple[Path, RunConfig], data: Path, tmp_path: Path) -> None:
    run = make_run(data, tmp_path, "--stages.1.growth.ffn", "mask")
    _copy_until(whole[0] / "checkpoints", tmp_path / "checkpoints", "step_00000003")
    with pytest.raises(FlmError, match="was grown with ffn = 'zero', and the run file now gives 'mask'"):
        train(run)


def test_masks_go_on_opening_behind_the_growth_of_the_next_stage(data: Path, tmp_path: Path) -> None:
    """Wide behind masks over 6 steps of a stage of 4; then deep, over 4: both half open at its first steps."""
    wide = "{num_layers: 2, hidden_size: 48, ffn_hidden_size: 48, num_attention_heads: 4, head_dim: 8}"
    deep = wide.replace("num_layers: 2", "num_layers: 3")
    growths = [{"hidden": "mask", "mask_steps": 6}, {"mask_steps": 4, "layer_selection": "distance"}]
    stages = [
        f"{{name: {name}, model: {model}, tokens: 512, growth: {json.dumps(growth)}}}"
        for name, model, growth in zip(("wide", "deep"), (wide, deep), growths, strict=True)
    ]
    small = f"{{name: small, model: {wide.replace('hidden_size: 48, ffn', 'hidden_size: 32, ffn')}, tokens: 128}}"
    options = [
        "--defaults.schedule.warmup_samples",
        "4",
        "--stages",
        f"[{', '.join([small, *stages])}]",
        "--checkpoint.interval_steps",
        "1",
    ]
    run, again = make_run(data, tmp_path / "a", *options), make_run(data, tmp_path / "b", *options)
    assert train(run) == 0
    certified = [event.certificate for event in read_events(tmp_path / "a", GrowthEvent)]
    assert [c is not None and c.comparisons[0].loss_change <= 1e-5 for c in certified] == [True, True]
    at = open_checkpoint(checkpoint_store(run).path("deep", 1)).manifest
    assert [(m.masks.dimensions, m.value(0)) for m in saved_opening(at)] == [(("hidden",), 5 / 6), (("layers",), 0.25)]
    for folder in ("small", "wide", "deep/step_00000001"):
        shutil.copytree(tmp_path / "a" / "checkpoints" / folder, tmp_path / "b" / "checkpoints" / folder)
    assert train(again) == 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[-3:]


def test_a_loss_beyond_the_tolerance_stops_the_run(whole: tuple[Path, RunConfig], data: Path, tmp_path: Path) -> None:
    strict = ("--stages.1.growth.loss_tolerance", "1e-30", "--stages.1.growth.new_scale", "trained")
    run = make_run(data, tmp_path, *strict)
    shutil.copytree(whole[0] / "checkpoints" / "small", tmp_path / "checkpoints" / "small")
    with pytest.raises(FlmError, match=r"--stages\.1\.growth\.loss_tolerance"):
        train(run)
    assert not (tmp_path / "checkpoints" / "big").exists()


def test_a_stop_asked_for_in_the_last_step_of_a_stage_stops_before_the_next(data: Path, tmp_path: Path) -> None:
    run = make_run(data, tmp_path, "--hooks", "[tests.support.recording_hook.StopInLastStep]")
    assert train(run) == 3
    assert {line[0] for line in losses(tmp_path)} == {"small"} and losses(tmp_path)[-1][1] == 4
    assert train(run) == 0, "at the run's own end there is nothing left to stop"
    assert losses(tmp_path)[-1][:2] == ("big", 8)
