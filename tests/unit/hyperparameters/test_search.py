"""Random and grid search of hyperparameters on a narrow model."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import DistillConfig, ModelConfig, MupConfig, OptimizerConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.hyperparameters import search as searching
from flm_megatron.hyperparameters.search import (
    SearchSettings,
    Trial,
    best,
    draws,
    lower_but_unstable,
    own_values,
    proxy_stage,
    search,
    with_values,
)
from flm_megatron.launch.preflight import resolve
from tests.support.runs import make_data, make_run

SETTINGS = SearchSettings(trials=3, steps=24, layers=1, global_batch=4, spread=3.0)
MUP = ("--stages.0.model.mup.enabled", "true", "--stages.0.model.mup.base_hidden_size", "16")
STAGE = StageConfig(
    name="wide",
    model=ModelConfig(hidden_size=512, mup=MupConfig(enabled=True, base_hidden_size=128)),
    optimizer=OptimizerConfig(lr=1e-3, matrix_lr=4e-3, min_lr=1e-4),
    micro_batch=6,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer and datasets."""
    return make_data(tmp_path_factory.mktemp("data"))


def test_trials_are_short_runs_that_learn_and_can_be_repeated(data: Path, tmp_path: Path) -> None:
    run = resolve(make_run(data, tmp_path, *MUP)[1])
    trials = list(search(run, run.stages[0], SETTINGS))
    own = own_values(run.stages[0])
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert trials[0].values == own
    for trial in trials[1:]:
        factors = [trial.values[name] / own[name] for name in own]
        assert all(1 / 3 <= factor <= 3 for factor in factors) and len(set(factors)) == 8
    assert trials[0].loss < math.log(500) - 0.1
    assert len({trial.loss for trial in trials}) == 3
    assert [trial.values for trial in trials] == draws(proxy_stage(run, run.stages[0], SETTINGS), SETTINGS)
    assert list(search(run, run.stages[0], replace(SETTINGS, trials=1))) == trials[:1]


def test_a_trial_that_diverges_is_unstable(data: Path, tmp_path: Path) -> None:
    run = resolve(make_run(data, tmp_path, *MUP, "--stages.0.model.matrix_init_std", "1e20")[1])
    (trial,) = search(run, run.stages[0], replace(SETTINGS, trials=1))
    assert not trial.stable and best([trial]) is None


def test_the_best_trial_is_the_lowest_that_does_not_keep_rising() -> None:
    trials = [Trial(0, {}, 3.0, 0.0), Trial(1, {}, 2.0, 0.9), Trial(2, {}, 2.5, -0.4), Trial(3, {}, math.nan, 0.0)]
    assert best(trials) is trials[2] and lower_but_unstable(trials) is trials[1]
    assert lower_but_unstable([trials[0], trials[2], trials[3], Trial(4, {}, math.inf, math.inf)]) is None


def test_an_unstable_trial_that_is_lower_is_not_passed_over_in_silence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file, _ = make_run(data, tmp_path, *MUP)

    def train(job: searching.Job) -> Trial:
        low = job.values["matrix_init_std"] < 0.01
        return Trial(job.number, job.values, 2.0 if low else 3.0, 0.45 if low else 0.1, job.key)

    monkeypatch.setattr(searching, "train", train)
    command = ["mup", "search", str(run_file), "--vary"]
    assert main([*command, "matrix_init_std=0.001,0.02"]) == 0
    printed = capsys.readouterr().out
    assert "best: trial 1, loss 3.0000" in printed
    assert "unstable, but lower: trial 0, loss 2.0000, whose gradient norm rises as step^0.45" in printed
    assert main([*command, "matrix_init_std=0.001"]) == 1
    assert "no trial is stable" in (printed := capsys.readouterr().out) and "unstable, but lower: trial 0" in printed


def test_trial_0_has_the_run_files_own_values_even_0() -> None:
    to_zero = replace(STAGE, optimizer=replace(STAGE.optimizer, min_lr=0.0))
    assert with_values(to_zero, own_values(to_zero)).optimizer == to_zero.optimizer


def test_the_proxy_is_narrow_and_the_rest_is_kept() -> None:
    run = RunConfig(stages=[STAGE])
    stage = proxy_stage(run, STAGE, SearchSettings(global_batch=8, steps=10))
    assert (stage.model.hidden_size, stage.model.num_attention_heads, stage.model.kv_channels) == (128, 1, 128)
    assert stage.model.width_factor == 1 and stage.model.num_layers == STAGE.model.num_layers
    assert (stage.micro_batch, stage.global_batch, stage.tokens) == (2, 8, 10 * 8 * run.data.sequence_length)
    changed = with_values(stage, own_values(stage) | {"lr": 5e-5, "output_mult": 3.0})
    assert (changed.optimizer.lr, changed.optimizer.min_lr, changed.optimizer.matrix_lr) == (5e-5, 5e-5, 4e-3)
    assert changed.model.output_mult == 3.0


@pytest.mark.slow
def test_a_grid_tries_every_combination_and_keeps_the_rest(data: Path, tmp_path: Path) -> None:
    run = resolve(make_run(data, tmp_path, *MUP, "--stages.0.optimizer.lr", "5e-3")[1])
    grid = (("lr", (1e-3, 4e-3)), ("weight_decay", (0.0, 0.1)))
    settings = replace(SETTINGS, steps=6, grid=grid)
    proxy = proxy_stage(run, run.stages[0], settings)
    assert draws(proxy, settings) == [{"lr": lr, "weight_decay": wd} for lr in (1e-3, 4e-3) for wd in (0.0, 0.1)]
    changed = with_values(proxy, draws(proxy, settings)[3])
    assert changed == replace(proxy, optimizer=replace(proxy.optimizer, lr=4e-3, weight_decay=0.1))
    one = list(search(run, run.stages[0], settings))
    known = {trial.key: trial for trial in one if trial.number != 2}  # the one that is left trains in another process
    two = list(search(run, run.stages[0], replace(settings, jobs=2), known))
    assert len({trial.loss for trial in one}) == 4 and sorted(two, key=lambda trial: trial.number) == one
    with pytest.raises(RequestError, match="names lr twice"):
        next(search(run, run.stages[0], replace(settings, grid=(grid[0], grid[0]))))


def test_a_trial_that_has_ended_is_not_run_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file, _ = make_run(data, tmp_path, *MUP)
    lines = tmp_path / "all.jsonl"
    command = ["mup", "search", str(run_file), "--steps", "4", "--layers", "1", "--out", str(lines), "--vary"]
    assert main([*command, "lr=1e-3"]) == 0
    written = lines.read_text()
    lines.write_text(written + written[: len(written) // 2])  # cut off in the middle of a line
    trained: list[float] = []

    def train(job: searching.Job) -> Trial:
        trained.append(job.values["lr"])
        return Trial(job.number, job.values, 9.0, 0.0, job.key)

    monkeypatch.setattr(searching, "train", train)
    assert main([*command, "lr=1e-3,2e-3"]) == 0
    assert trained == [2e-3] and "best: trial 0" in capsys.readouterr().out.split("trial   1")[1]
    assert main([*command, "lr=1e-3", "--vary", "weight_decay=0"]) == 0  # the same trial, described anew
    assert len(trained) == 1 and "  weight_decay: 0\n" in capsys.readouterr().out
    lines.write_bytes(b"\xff\xfe\n" + lines.read_bytes())
    assert main([*command, "lr=2e-3"]) == 0 and len(trained) == 1


def test_a_file_of_something_else_is_left_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, _ = make_run(data, tmp_path, *MUP)
    before = run_file.read_text()
    assert main(["mup", "search", str(run_file), "--steps", "4", "--layers", "1", "--out", str(run_file)]) == 2
    assert "holds something else than trials" in capsys.readouterr().err and run_file.read_text() == before


@pytest.mark.parametrize("given", ["lr=0", "lr=nan", "lr=", "lr", "layers=3", "lr=1e-3,-1", "lr=1,1"])
def test_values_that_make_no_sense_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mup", "search", "run.yaml", "--vary", given]) == 2
    assert "argument --vary" in capsys.readouterr().err


def test_a_grid_takes_no_options_of_random_draws(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mup", "search", "run.yaml", "--vary", "lr=1", "--spread", "2"]) == 2
    assert "--spread is for random draws, and --vary tries every combination" in capsys.readouterr().err


def test_requests_that_make_no_sense_are_refused() -> None:
    run = RunConfig(stages=[STAGE])
    without = replace(STAGE, model=ModelConfig())
    with pytest.raises(RequestError, match="stage 'wide' does not use muP"):
        proxy_stage(run, without, SETTINGS)
    with pytest.raises(RequestError, match="stage 'wide' distils, but a search runs no teacher"):
        proxy_stage(run, replace(STAGE, distill=DistillConfig("another")), SETTINGS)
    with pytest.raises(RequestError, match=re.escape("trials 0, steps 24, spread 3.0")):
        next(search(run, STAGE, replace(SETTINGS, trials=0)))


def test_command_prints_the_best_values(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, _ = make_run(data, tmp_path, *MUP)
    lines = tmp_path / "trials" / "all.jsonl"
    arguments = ["--trials", "2", "--steps", "6", "--layers", "1", "--global-batch", "4", "--out", str(lines)]
    assert main(["mup", "search", str(run_file), *arguments]) == 0
    printed = capsys.readouterr().out
    trials = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(trials) == 2 and len(trials[1]["values"]) == 8
    assert re.search(r"^best: trial [01], loss \d", printed, re.M)
    section = printed.split("\nmodel:\n")[1]
    written = tmp_path / "found.yaml"
    written.write_text(f"stages:\n- model:\n{_indented(section)}")
    assert load_run(written).stages[0].optimizer.matrix_lr


def _indented(section: str) -> str:
    """The printed sections as they go into a stage of a run file."""
    return "".join(f"  {line}\n" for line in section.splitlines())


def test_command_refuses_a_run_without_mup(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, _ = make_run(data, tmp_path)
    assert main(["mup", "search", str(run_file)]) == 2
    assert "does not use muP" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_end_with_the_command(data: Path, tmp_path: Path) -> None:
    run_file, _ = make_run(data, tmp_path, *MUP)
    options = ["--steps", "1000000", "--vary", "lr=1e-3,2e-3", "--jobs", "2"]
    command = psutil.Popen([sys.executable, "-m", "flm_megatron.cli.main", "mup", "search", str(run_file), *options])
    try:
        deadline = time.monotonic() + 120
        while len(trials := trials_of(command)) < 2:
            assert time.monotonic() < deadline, "no trials"
            time.sleep(0.05)
    finally:
        command.kill()
        command.wait()
    assert not psutil.wait_procs(trials, timeout=20)[1]


def trials_of(command: psutil.Popen) -> list[psutil.Process]:
    """The processes that train trials."""
    return [child for child in command.children() if any("spawn_main" in part for part in child.cmdline())]
