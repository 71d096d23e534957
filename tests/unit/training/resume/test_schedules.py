"""A run that an earlier version began keeps the defaults of its schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.checkpoint.files.manifest import MANIFEST, manifest_text
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import RunConfig, ScheduleConfig, StageConfig
from flm_megatron.training.resume.schedules import with_saved_schedules

OPEN = ScheduleConfig(kind="wsd", boundary="rewarm")
EARLIER = replace(OPEN, warmup_tokens=0, wsd_decay_fraction=0.1)


def run_with(output: Path, schedule: ScheduleConfig) -> RunConfig:
    """A run of two stages on one schedule."""
    stages = [StageConfig(name=name, tokens=10**6, schedule=schedule) for name in ("one", "two")]
    return RunConfig(output=str(output), stages=stages)


@pytest.mark.parametrize(
    ("saved", "given", "resumed"),
    [
        (EARLIER, OPEN, EARLIER),
        (EARLIER, replace(OPEN, wsd_decay_fraction=0.3), replace(EARLIER, wsd_decay_fraction=0.3)),
        (replace(EARLIER, boundary="restart"), OPEN, OPEN),
        (OPEN, OPEN, OPEN),
        (EARLIER, replace(OPEN, boundary="restart"), replace(OPEN, boundary="restart")),
    ],
    ids=["an earlier version's", "given now", "another boundary then", "this version's", "another boundary now"],
)
def test_what_the_run_file_leaves_open_stays_as_it_was(
    tmp_path: Path, saved: ScheduleConfig, given: ScheduleConfig, resumed: ScheduleConfig
) -> None:
    folder = tmp_path / "checkpoints/one/step_00000007"
    folder.mkdir(parents=True)
    (folder.with_name("step_00000008")).mkdir()  # as a save that was interrupted leaves it
    manifest = Manifest.from_json({"run": run_to_dict(run_with(tmp_path, saved))})
    (folder / MANIFEST).write_text(manifest_text(manifest))
    assert with_saved_schedules(run_with(tmp_path, given)) == run_with(tmp_path, resumed)


def test_a_run_without_checkpoints_has_the_present_defaults(tmp_path: Path) -> None:
    run = run_with(tmp_path, OPEN)
    assert with_saved_schedules(run) == run
