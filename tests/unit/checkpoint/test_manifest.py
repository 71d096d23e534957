"""The record behind `manifest.json`: what is saved is read back, of our version, of others, and of none."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from flm_megatron.checkpoint.files.manifest import MANIFEST, manifest_text, read_manifest
from flm_megatron.checkpoint.manifest import Manifest, RecordedGrowth, RecordedLayout, RecordedRun, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, StageConfig
from tests.fixtures import CHECKPOINT_V1

FIRST_FORMAT = next((CHECKPOINT_V1 / "output" / "checkpoints" / "small").glob("step_*4"))
LATER = {
    "run": {"later": 1, "data": {"train": [], "later": None}, "stages": [{"name": "a", "model": {"later": 3}}]},
    "stage": "a",
    "growth": {"plan": {"stage": "b", "later": [1]}, "later": 2},
    "stability": {"loss": [2.5], "levels": [[3, None]], "skipped": 0, "later": 5},
    "layout": {"tensor": 2, "pipeline": 3, "later": 6, "world": 12},
    "later": {"a": [None]},
}


def plain(manifest: Manifest) -> dict[str, object]:
    """The manifest as JSON gives it back."""
    return json.loads(json.dumps(manifest.to_json()))


def test_a_position_is_written_after_the_run_and_read_back() -> None:
    position = StagePosition(step=0, samples=2, tokens=3, optimizer_step=4)
    manifest = stage_manifest(RunConfig(stages=[StageConfig(name="a")]), 0, ModelConfig(vocab_size=9), position)
    assert list(manifest.to_json()) == ["run", "stage", "step", "samples", "tokens", "optimizer_step", "version"]
    assert Manifest.from_json(manifest.to_json()).position == StagePosition(0, 2, 3, 4, "a")


def test_what_is_not_known_is_left_out() -> None:
    assert Manifest().to_json() == Manifest(growth=None, position=StagePosition()).to_json() == {"version": 1}
    assert Manifest.from_json({"step": 7, "tokens": None, "run": None}) == Manifest(position=StagePosition(7))
    assert StagePosition(7, stage="a").to_json() == {"stage": "a", "step": 7}


def test_numbers_of_other_programs_that_count_nothing_are_not_known() -> None:
    assert StagePosition.of_others(7, -1, True) == StagePosition(7) == StagePosition.of_others(7, "x", 2**62)


def test_the_run_that_is_saved_is_read_back() -> None:
    model = ModelConfig(vocab_size=300, num_layers=3)
    data = DataConfig(sequence_length=77, train=[SourceConfig("a"), SourceConfig("b/c")])
    stages = [StageConfig(name="first"), StageConfig(name="second", precision="bf16")]
    run = RunConfig(tokenizer="t.model", data=data, stages=stages)
    found = stage_manifest(run, 1, model, StagePosition(1, 2, 3, 4)).run
    assert (found.tokenizer, found.sequence_length, found.train) == ("t.model", 77, ("a", "b/c"))
    second = found.stage("second")
    assert second is not None and second.precision == "bf16"
    assert second.model["vocab_size"] == 300 and second.model["num_layers"] == 3
    assert found.stage("third") is None and found.stage(None) is None


@pytest.mark.parametrize("run", [{}, {"data": None, "tokenizer": None, "stages": []}])
def test_a_run_that_says_nothing_has_defaults(run: dict[str, object]) -> None:
    found = RecordedRun.model_validate(run)
    assert (found.tokenizer, found.sequence_length, found.train, found.stages) == (None, 4096, (), [])


def test_a_manifest_of_the_first_format_is_read_and_written_again_as_it_was() -> None:
    manifest = open_checkpoint(FIRST_FORMAT).manifest
    assert manifest.position == StagePosition(4, 16, 512, 4, "small")
    assert [stage.name for stage in manifest.run.stages] == ["small"]
    assert manifest.run.sequence_length == 32 and manifest.run.train == ("web", "code")
    assert json.loads(manifest_text(manifest)) == json.loads((FIRST_FORMAT / MANIFEST).read_text())


def test_what_a_later_version_adds_is_kept_in_every_copy(tmp_path: Path) -> None:
    source = Manifest.from_json(LATER)
    assert plain(source) == LATER | {"version": 1}
    copy_checkpoint(open_checkpoint(FIRST_FORMAT), tmp_path / "a", source)
    copy_checkpoint(open_checkpoint(tmp_path / "a"), tmp_path / "b")
    copied = read_manifest(tmp_path / "b")
    assert copied is not None and LATER.items() <= plain(copied).items()
    assert pickle.loads(pickle.dumps(copied)).to_json() == copied.to_json()


def test_the_last_word_on_what_both_say() -> None:
    first, second = Manifest.from_json(LATER), Manifest.from_json({"step": 3, "later": 1, "tensors": {}})
    both = plain(first | second)
    assert both == {key: value for key, value in LATER.items() if key != "stage"} | {
        "step": 3, "later": 1, "tensors": {}, "version": 1
    }  # fmt: skip
    assert (first | Manifest(growth=None)) == first
    assert (first | Manifest(growth=RecordedGrowth.model_validate({"plan": None}))).to_json()["growth"] == {
        "plan": None
    }


def test_a_manifest_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(Manifest(), "growth", None)  # noqa: B010


def test_the_data_parallel_size_follows_from_a_layout() -> None:
    assert RecordedLayout(tensor=2, pipeline=3, world=12).data_size == 2
    assert RecordedLayout.model_validate({"tensor": 2, "pipeline": 3}).data_size is None
