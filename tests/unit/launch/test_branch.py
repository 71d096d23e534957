"""Decay branches: their run files, their metrics and the launched command; what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.api.train import train
from flm_megatron.checkpoint.files.manifest import MANIFEST, manifest_text
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.cli.main import main
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import history_to_json
from flm_megatron.config.loader import dump_run, run_to_dict
from flm_megatron.config.rules import violations
from flm_megatron.config.schema import (
    ChatConfig,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)
from flm_megatron.errors import RequestError
from flm_megatron.growth.plan import make_plan
from flm_megatron.growth.record import GrowthRecord
from flm_megatron.launch.branch import branch_tokens, bring_metrics, decay_branch, require_no_branch_in_training
from flm_megatron.launch.run import train as train_checked
from flm_megatron.launch.run_lease import run_lease
from flm_megatron.optim.learning_rate import learning_rate
from flm_megatron.training.metrics.events import FILE, MetricsEvent, RestartEvent, line_text, read_events
from flm_megatron.training.resume.start import checkpoint_store, find_start

STEP = 100
"""Tokens of a step."""
SCHEDULE = ScheduleConfig(kind="wsd", boundary="rewarm", warmup_tokens=10 * STEP, wsd_decay_fraction=0.1)


def run_in(output: Path, schedule: ScheduleConfig = SCHEDULE) -> RunConfig:
    """A run of two stages, of 50 and 150 steps."""
    options = OptimizerConfig(lr=1.0, min_lr=0.1)
    stages = [
        StageConfig(name=name, tokens=steps * STEP, global_batch=10, optimizer=options, schedule=schedule)
        for name, steps in (("one", 50), ("two", 150))
    ]
    return RunConfig(name="trunk", output=str(output), stages=stages, data=DataConfig(sequence_length=10))


def save(run: RunConfig, stage: int, step: int, **more: object) -> Path:
    """The manifest of a checkpoint of the run, with `more` in it."""
    budgets = stage_budgets(run)[: stage + 1]
    path = checkpoint_store(run).path(run.stages[stage].name, step)
    history = history_to_json([budget.segments[0] for budget in budgets])
    known = {"run": run_to_dict(run), "stage": run.stages[stage].name, "step": step, "history": history, **more}
    path.mkdir(parents=True)
    (path / MANIFEST).write_text(manifest_text(Manifest.from_json(known)))
    return path


@pytest.fixture
def trunk(tmp_path: Path) -> RunConfig:
    """The run with checkpoints at 5000 (the end of a stage), 9000 and 19500 tokens."""
    run = run_in(tmp_path)
    for stage, step in ((0, 50), (1, 40), (1, 145)):
        save(run, stage, step)
    return run


def rates(run: RunConfig) -> list[float]:
    """Learning rate of every step."""
    return [
        learning_rate(budget.tokens_at(step + 1), run, index)
        for index, budget in enumerate(stage_budgets(run))
        for step in range(budget.steps)
    ]


@pytest.mark.parametrize("text", ["decay@1500000", "decay@1.5M", "decay@1.5e6", "decay@1500K", "decay@0.0015B"])
def test_tokens_are_given_in_any_unit(text: str) -> None:
    assert branch_tokens(text) == 1_500_000


@pytest.mark.parametrize("text", ["decay", "decay@", "decay@1.5", "decay@0", "cosine@1M", "decay@1e99", "decay@-1M"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"is not of the form decay@TOKENS"):
        branch_tokens(text)


@pytest.mark.parametrize(("share", "steps"), [(0.1, 100), (1 / 11, 99), (0.2, 113), (0.5, 180)])
def test_a_branch_follows_the_trunk_and_then_decays_over_its_share(trunk: RunConfig, share: float, steps: int) -> None:
    schedules = [replace(SCHEDULE, wsd_decay_fraction=share) for _ in trunk.stages]
    stages = [replace(stage, schedule=each) for stage, each in zip(trunk.stages, schedules, strict=True)]
    branch = decay_branch(replace(trunk, stages=stages), "decay@9K")
    assert branch.output == f"{trunk.output}/branches/decay@9000" and not violations(branch)
    found = rates(branch)
    assert len(found) == steps
    assert found[:90] == rates(trunk)[:90]
    assert found[90:] == pytest.approx([1 - 0.9 * n / (steps - 90) for n in range(1, steps - 89)], rel=1e-12)


def test_a_branch_of_a_stage_is_that_stage_trained_on(trunk: RunConfig) -> None:
    branch = decay_branch(trunk, "decay@5000")
    assert [stage.name for stage in branch.stages] == ["one"] and len(rates(branch)) == 56
    start = find_start(branch)
    source = checkpoint_store(trunk).path("one", 50)
    assert start is not None and (start.step, start.source, start.resumes) == (50, source, True)


def test_a_constant_schedule_decays_as_wsd_does(tmp_path: Path) -> None:
    run = run_in(tmp_path, replace(SCHEDULE, kind="constant"))
    save(run, 1, 40)
    wsd = replace(run, stages=[replace(stage, schedule=SCHEDULE) for stage in run.stages])
    assert rates(decay_branch(run, "decay@9000")) == rates(decay_branch(wsd, "decay@9000"))


def test_a_short_warm_up_does_not_grow_with_the_stage(tmp_path: Path) -> None:
    run = run_in(tmp_path, replace(SCHEDULE, warmup_tokens=None, wsd_decay_fraction=0.9))
    save(run, 0, 10)
    assert rates(decay_branch(run, "decay@1000"))[9] == rates(run)[9] == 1.0


def test_a_branch_that_has_begun_needs_the_trunks_checkpoint_no_longer(trunk: RunConfig) -> None:
    branch = decay_branch(trunk, "decay@9000")
    own = save(branch, 1, 45)
    shutil.rmtree(checkpoint_store(trunk).path("two", 40))
    assert decay_branch(trunk, "decay@9000") == branch
    with pytest.raises(RequestError, match="keeps no checkpoint at 9,000 tokens"):  # before anything is set aside
        decay_branch(trunk, "decay@9000", anew=True)
    assert checkpoint_store(branch).newest("two") == [own]
    shutil.rmtree(own)
    with pytest.raises(RequestError, match=r"branch_of .*step_00000040 is not a checkpoint, or no longer"):
        find_start(branch)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (9100, "keeps no checkpoint at 9,100 tokens, the nearest is at 9,000 and 19,500"),
        (100, "keeps no checkpoint at 100 tokens, the nearest is at 5,000:"),
        (30_000, "lies beyond the run, which ends at 20,000 tokens"),
        (19_500, "not in its stable phase at 19,500 tokens: the learning rate of stage 'two' is 0.325 there"),
        (5_500, "not in its stable phase at 5,500 tokens: the learning rate of stage 'two' is 0.5 there"),
    ],
)
def test_tokens_without_a_branch_are_refused(trunk: RunConfig, tokens: int, words: str) -> None:
    save(trunk, 1, 5) if tokens == 5_500 else None
    with pytest.raises(RequestError, match=words):
        decay_branch(trunk, f"decay@{tokens}")


@pytest.mark.parametrize("multiplier", ["lr_mult", "new_lr_mult"])
def test_a_rate_that_a_growth_still_changes_does_not_decay(tmp_path: Path, multiplier: str) -> None:
    run = run_in(tmp_path)
    growth = run.stages[1].growth = GrowthConfig()
    setattr(growth, multiplier, 2.0)
    plan = make_plan(ModelConfig(num_layers=1), ModelConfig(num_layers=2), GrowthConfig(mask_steps=60), 1, [0.5])
    grown = {"growth": GrowthRecord(plan).to_json()}
    for step in (59, 60):
        save(run, 1, step, **grown)
    with pytest.raises(RequestError, match=r"new_lr_mult of stage 'two' still .*: branch from its step 60 on"):
        decay_branch(run, "decay@10900")
    branch = decay_branch(run, "decay@11000")
    growth.lr_mult_steps = 80
    with pytest.raises(RequestError, match="at 11,000 tokens, its step 60: branch from its step 80 on"):
        decay_branch(run, "decay@11000")
    save(branch, 1, 61, **grown)
    decay_branch(run, "decay@11000")  # what has begun goes on


def test_runs_without_branches_are_refused(trunk: RunConfig, tmp_path: Path) -> None:
    branch = decay_branch(trunk, "decay@9000")
    with pytest.raises(RequestError, match="is itself a branch"):
        decay_branch(branch, "decay@9000")
    with pytest.raises(RequestError, match="has no checkpoint: train the run first"):
        decay_branch(run_in(tmp_path / "new"), "decay@9000")
    with pytest.raises(RequestError, match=r"a fine-tuning \(data.chat\) has no branches"):
        decay_branch(replace(trunk, data=replace(trunk.data, chat=ChatConfig())), "decay@9000")
    cosine = [replace(stage, schedule=ScheduleConfig(boundary="rewarm")) for stage in trunk.stages]
    with pytest.raises(RequestError, match="stage 'two' has a cosine schedule, which has no stable phase"):
        decay_branch(replace(trunk, stages=cosine), "decay@9000")
    whole = [replace(stage, schedule=ScheduleConfig("constant", wsd_decay_fraction=1)) for stage in trunk.stages]
    with pytest.raises(RequestError, match="wsd_decay_fraction is 1: a branch needs a share below 1"):
        decay_branch(replace(trunk, stages=whole), "decay@9000")


def test_a_run_is_not_set_aside_under_a_branch_in_training(trunk: RunConfig) -> None:
    branch = decay_branch(trunk, "decay@9000")
    with run_lease(branch), pytest.raises(RequestError, match=r"branches/decay@9000 is in use by .*: wait until"):
        train_checked(trunk, anew=True)
    assert checkpoint_store(trunk).newest("two") and not list(Path(trunk.output).glob("*.before-*"))
    require_no_branch_in_training(trunk)


def test_metrics_begin_with_the_trunks(trunk: RunConfig) -> None:
    events = [RestartEvent("one", 50, 5000), RestartEvent("two", 40, 9000), RestartEvent("two", 41, 9100)]
    (Path(trunk.output) / FILE).write_text("".join(line_text(event) + "\n" for event in events))
    branch = decay_branch(trunk, "decay@9000")
    Path(branch.output).mkdir(parents=True)
    start = find_start(branch)
    bring_metrics(branch, start)
    assert read_events(Path(branch.output), MetricsEvent) == events[:2]
    (Path(trunk.output) / FILE).unlink()
    bring_metrics(branch, start)  # it has begun: nothing is brought again
    assert read_events(Path(branch.output), MetricsEvent) == events[:2]


def test_the_launched_command_trains_the_branch(trunk: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(trunk.output) / "run file.yaml"
    file.write_text(dump_run(trunk))
    command = ["launch", str(file), "--dry-run", "--processes-per-node", "1", "--branch", "decay@9K"]
    for launcher in ("torchrun", "slurm"):
        assert main([*command, "--on", launcher, "--seed", "1234"]) == 0
        assert f"train '{file}' --branch decay@9K --seed 1234" in capsys.readouterr().out
    assert main([*command, "--on", "slurm", "--stage", "two"]) == 2
    assert "argument --stage: not allowed with argument --branch" in capsys.readouterr().err
    with pytest.raises(RequestError, match="give --branch or --stage two, not both"):
        train(trunk, stage="two", branch="decay@9000")
