"""A run that an earlier version began keeps that version's defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flm_megatron.checkpoint.files.manifest import MANIFEST, manifest_text
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import GrowthConfig, RunConfig, ScheduleConfig, StageConfig
from flm_megatron.training.resume.saved_defaults import with_saved_defaults
from tests.support.checkpoint_cases import MODEL, write_small

OPEN = ScheduleConfig(kind="wsd", boundary="rewarm")
EARLIER = replace(OPEN, warmup_tokens=0, wsd_decay_fraction=0.1)


def run_with(output: Path, schedule: ScheduleConfig) -> RunConfig:
    """A run of two stages on one schedule."""
    stages = [StageConfig(name=name, tokens=10**6, schedule=schedule) for name in ("one", "two")]
    return RunConfig(output=str(output), stages=stages)


def save(output: Path, run: RunConfig) -> None:
    """Leave a checkpoint of the run, and a save that was interrupted."""
    folder = output / "checkpoints/one/step_00000007"
    folder.mkdir(parents=True)
    (folder.with_name("step_00000008")).mkdir()
    (folder / MANIFEST).write_text(manifest_text(Manifest.from_json({"run": run_to_dict(run)})))


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
    save(tmp_path, run_with(tmp_path, saved))
    assert with_saved_defaults(run_with(tmp_path, given)) == run_with(tmp_path, resumed)


def test_a_run_without_checkpoints_has_the_present_defaults(tmp_path: Path) -> None:
    run = run_with(tmp_path, OPEN)
    assert with_saved_defaults(run) == run


def growing(output: Path, growth: GrowthConfig | None) -> RunConfig:
    """A run whose second stage grows."""
    run = run_with(output, ScheduleConfig())
    return replace(run, stages=[run.stages[0], replace(run.stages[1], growth=growth)])


@pytest.mark.parametrize(
    ("saved", "given", "resumed"),
    [
        (GrowthConfig(layer_selection="distance"), GrowthConfig(), GrowthConfig(layer_selection="distance")),
        (GrowthConfig(layer_selection="distance"), GrowthConfig(layer_selection="stack"), None),
        (GrowthConfig(), GrowthConfig(), None),
        (GrowthConfig(layer_selection="top"), GrowthConfig(), None),
        (None, GrowthConfig(), None),
    ],
    ids=["an earlier version's", "given now", "this version's", "given then", "no growth then"],
)
def test_layers_that_were_to_be_chosen_by_distance_still_are(
    tmp_path: Path, saved: GrowthConfig | None, given: GrowthConfig, resumed: GrowthConfig | None
) -> None:
    save(tmp_path, growing(tmp_path, saved))
    assert with_saved_defaults(growing(tmp_path, given)) == growing(tmp_path, resumed or given)


@pytest.mark.parametrize(
    ("begun", "saved", "resumed"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_a_model_that_an_earlier_version_took_untied_out_of_a_tied_folder_stays_untied(
    tmp_path: Path, begun: bool, saved: bool, resumed: bool
) -> None:
    """Where the folder is not tied, the run file itself says so, which is refused as another model."""
    write_small(tmp_path / "initial", replace(MODEL, tie_embeddings=begun))

    def run_of(tied: bool) -> RunConfig:
        """A run that begins from the folder."""
        run = run_with(tmp_path, ScheduleConfig())
        run.checkpoint.initial = str(tmp_path / "initial")
        return replace(run, stages=[replace(s, model=replace(MODEL, tie_embeddings=tied)) for s in run.stages])

    save(tmp_path, run_of(saved))
    assert with_saved_defaults(run_of(True)) == run_of(resumed)
