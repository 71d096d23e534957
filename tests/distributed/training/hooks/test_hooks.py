"""Hooks of the user's own: when they are called, what they may record, and what happens when they fail."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from flm_megatron.training.metrics.events import StepEvent, read_events
from tests.support import REPOSITORY
from tests.support.recording_hook import FILE
from tests.support.runs import flm, make_run

RECORDING = "tests.support.recording_hook.Recording"
REFUSING = "tests.support.recording_hook.Refusing"
STEPS = 8


def expected_moments() -> list[str]:
    """What one rank is told in a run of eight steps with a checkpoint every four."""
    moments = ["start 0"]
    for step in range(1, STEPS + 1):
        moments += [f"before {step - 1}", f"after {step}"]
        moments += [f"interval {step}"] if step % 2 == 0 else []
        moments += [f"save {step}"] if step == 4 else []
    return [*moments, f"end-True {STEPS}", f"save {STEPS}"]


def test_every_rank_is_told_of_every_moment_and_values_are_recorded(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path / "run", "--hooks", f"[{RECORDING}]", "--checkpoint.interval_steps", "4")
    ended = flm("train", source)
    assert ended.returncode == 0, ended.stderr
    lines = (tmp_path / "run" / FILE).read_text().splitlines()
    for rank in "01":
        assert [line[2:] for line in lines if line[0] == rank] == expected_moments()
    steps = read_events(tmp_path / "run", StepEvent)
    assert len(steps) == STEPS and all(step.extra["half_loss"] == step.loss / 2 for step in steps)


def test_a_hook_that_refuses_a_checkpoint_ends_the_run_and_leaves_none(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, "--hooks", f"[{REFUSING}]")
    ended = flm("train", source)
    assert ended.returncode == 1 and "this must not be saved" in ended.stderr
    assert not list((tmp_path / "checkpoints").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("nowhere.Hook", "hooks: nowhere.Hook cannot be imported: No module named 'nowhere'"),
        ("Hook", "hooks: Hook cannot be imported"),
        ("pathlib.Path", "hooks: pathlib.Path is no hook: derive it from"),
        ("tests.support.recording_hook.WithArguments", "WithArguments() cannot be made: "),
    ],
)
def test_what_is_no_hook_is_refused_before_anything_starts(hook: str, words: str, data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path / "run", "--hooks", f"[{hook}]")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    ended = flm("train", source)
    assert ended.returncode == 2 and words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_the_example_of_the_page_does_what_it_says(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "hooks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\nhooks: (.*?)\n```", page, re.DOTALL)
    (tmp_path / "my_hooks.py").write_text(code)
    source, _ = make_run(data, tmp_path / "run", "--hooks", yaml, "--stages.0.tokens", "1408")
    monkeypatch.syspath_prepend(tmp_path)
    ended = flm("train", source)
    assert ended.returncode == 0, ended.stderr
    steps = read_events(tmp_path / "run", StepEvent)
    assert len(steps) == 11 and all(math.isclose(step.extra["perplexity"], math.exp(step.loss)) for step in steps)
    said = f"small step 10: perplexity {steps[9].extra['perplexity']:.1f} on 2 ranks"
    assert said in (tmp_path / "run/log.txt").read_text()
