"""Whole runs: resume is exact, signals save, a killed run goes on, and requests that cannot be met are one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.errors import RequestError
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.training.metrics.events import RestartEvent, StepEvent, ValidationEvent, read_events
from flm_megatron.training.metrics.goodput import read_goodput
from flm_megatron.training.resume.start import checkpoint_store
from tests.support.layouts import relative_difference
from tests.support.runs import final_hash, flm, losses, make_run, start_flm, wait_for_step

STEPS = 8


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run of eight steps."""
    output = tmp_path_factory.mktemp("whole")
    _, run = make_run(data, output)
    assert train(resolve(run)) == 0
    return output


def test_a_run_reports_every_step_and_validates(whole: Path) -> None:
    assert [line[1] for line in losses(whole)] == list(range(1, STEPS + 1))
    validation = read_events(whole, ValidationEvent)
    assert [event.step for event in validation] == [4, 8]
    assert validation[1].loss < validation[0].loss
    assert (whole / "run.yaml").exists()
    log = (whole / "log.txt").read_text()
    assert "small step 8/8" in log and "0 steps lost" in log
    metered = read_goodput(whole)
    assert metered is not None and 0 < metered.share < 1 and metered.stalls_s["save"] > 0
    assert metered.steps_s == pytest.approx(sum(step.step_time_s for step in read_events(whole, StepEvent)))
    assert log.splitlines()[-4:] == [
        "test: trained to the end of its budget",
        f"  checkpoint {whole}/checkpoints/small/step_00000008",
        f"  metrics    {whole}/metrics.jsonl (log.txt and run.yaml beside it)",
        f"  next       flm report {whole}",
    ]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_run_in_two_halves_is_bit_identical(data: Path, whole: Path, tmp_path: Path, asynchronous: bool) -> None:
    _, run = make_run(data, tmp_path, "--checkpoint.interval_steps", "3")
    run.checkpoint.asynchronous = asynchronous
    run = resolve(run)
    half = replace(run.stages[0], tokens=512, schedule=replace(run.stages[0].schedule, decay_tokens=1024))
    assert train(replace(run, stages=[half])) == 0
    assert train(run) == 0
    assert losses(tmp_path) == losses(whole)
    assert final_hash(tmp_path) == final_hash(whole)
    assert [event.step for event in read_events(tmp_path, RestartEvent)] == [4]


def test_a_run_resumes_under_another_layout(data: Path, whole: Path, tmp_path: Path) -> None:
    _, run = make_run(data, tmp_path)
    run = resolve(run)
    half = replace(run.stages[0], tokens=512, schedule=replace(run.stages[0].schedule, decay_tokens=1024))
    assert train(replace(run, stages=[half])) == 0
    run.stages[0].parallel = replace(run.stages[0].parallel, tensor=1, pipeline=2, data=2)
    assert train(run) == 0
    ours, theirs = ([line[2:] for line in losses(output)] for output in (tmp_path, whole))
    assert relative_difference(ours, theirs) <= 1e-5


def test_a_signal_saves_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    source, run = make_run(data, tmp_path, "--stages.0.tokens", "12800")  # 100 steps
    process = start_flm("train", source)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    saved = checkpoint_store(run).latest(["small"])
    assert saved is not None
    step = open_checkpoint(saved).manifest.position.step
    assert step is not None and 3 <= step < 100 and losses(tmp_path)[-1][1] == step
    again = flm("train", source, "--stages.0.tokens", str((step + 2) * 128))
    assert again.returncode == 0, again.stderr
    assert [line[1] for line in losses(tmp_path)] == list(range(1, step + 3))


def _catches_sigterm(pid: int) -> bool:
    """Whether a process has a handler for the signal, as Linux says in `SigCgt`."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("after_s", [0.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (3.0, 6.0))])
def test_a_signal_before_training_leaves_nothing_half_made(data: Path, tmp_path: Path, after_s: float) -> None:
    long = ("--stages.0.tokens", "1280000")  # 10,000 steps: a quick machine may have begun, none has ended
    source, run = make_run(data, tmp_path, "--output", str(tmp_path / "run"), *long)
    process = start_flm("train", source)
    while not _catches_sigterm(process.pid):
        time.sleep(0.01)
    time.sleep(after_s)  # importing, checking, starting ranks: whatever it is that the signal meets
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert errors in ("", "flm train: stopped by a signal before training began\n")
    made = {path.relative_to(run.output).as_posix() for path in Path(run.output).rglob("*.partial")}
    assert not made


@pytest.mark.slow  # test_a_second_run_on_an_output_leaves_the_first_alone kills one too
def test_a_killed_run_reaches_the_same_weights(data: Path, whole: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, "--checkpoint.interval_steps", "2")
    process = start_flm("train", source)
    wait_for_step(tmp_path, 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    again = flm("train", source)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == losses(whole)
    assert final_hash(tmp_path) == final_hash(whole)


def test_a_finished_run_has_nothing_left_to_do(data: Path, whole: Path) -> None:
    before = final_hash(whole)
    _, run = make_run(data, whole)
    assert train(resolve(run)) == 0
    assert final_hash(whole) == before


def test_checkpoints_are_thinned_out_but_the_last_stays(data: Path, tmp_path: Path) -> None:
    _, run = make_run(
        data, tmp_path, "--checkpoint.interval_steps", "1", "--checkpoint.keep_last", "1",
        "--checkpoint.keep_every_steps", "4", "--stages.0.tokens", "768",
    )  # fmt: skip
    assert train(resolve(run)) == 0
    assert checkpoint_store(run).steps("small") == [4, 6]


def test_another_model_shape_is_refused_on_resume(data: Path, whole: Path) -> None:
    _, run = make_run(data, whole, "--stages.0.model.ffn_hidden_size", "64", "--stages.0.tokens", "2048")
    with pytest.raises(RequestError, match="ffn_hidden_size is 64 in the run file and 48 in the checkpoint"):
        train(resolve(run))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--stages.0.parallel.tensor", "3"], "num_attention_heads"),
        (["--stages.0.parallel.tesnor", "2"], "tensor"),
        (["--tokenizer", "/nowhere/tokenizer.model"], "/nowhere/tokenizer.model"),
        (["--data.train.0.path", "/nowhere/train"], "/nowhere/train"),
        (["--stages.0.global_batch", "5", "--stages.0.micro_batch", "2"], "global_batch"),
        (["--kernels.adamw", "te"], "kernels.adamw: te cannot run here"),
        (["--stages.0.transformer_engine", "true"], "which is not installed"),
        (["--checkpoint.initial", "/nowhere/checkpoint"], "/nowhere/checkpoint is not a checkpoint"),
        (["--data.sequence_length", "9999", "--stages.0.tokens", "80000"], "too few for one sample of 9999"),
        (["--stage", "large"], "no stage is named 'large'; the run has small"),
        (["--output", "/proc/run"], "output /proc/run cannot be written"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_two(
    data: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    source, _ = make_run(data, tmp_path)
    result = flm("train", source, *overrides)
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    # The resolved run file is written before the first process starts.
    assert not (tmp_path / "run.yaml").exists()


def test_torchrun_joins_ranks_that_it_started(data: Path, whole: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flm_megatron.cli.main", "train", str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == losses(whole)
