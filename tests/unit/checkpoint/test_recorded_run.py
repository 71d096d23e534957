"""The run file in a manifest, as tools read it: of our version, of others, and of none."""

from __future__ import annotations

from dataclasses import replace

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.position import StagePosition
from flm_megatron.checkpoint.recorded_run import RecordedRun, RecordedStage, recorded_run
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, StageConfig
from tests.fixtures import CHECKPOINT_V1


def test_what_a_run_saves_is_read_back() -> None:
    model = ModelConfig(vocab_size=300, num_layers=3)
    data = DataConfig(sequence_length=77, train=[SourceConfig("a"), SourceConfig("b/c")])
    stages = [StageConfig(name="first"), StageConfig(name="second", precision="bf16")]
    run = RunConfig(tokenizer="t.model", data=data, stages=stages)
    found = recorded_run(stage_manifest(run, 1, model, StagePosition(1, 2, 3, 4)))
    assert (found.tokenizer, found.sequence_length, found.train) == ("t.model", 77, ("a", "b/c"))
    second = found.stage("second")
    assert second is not None and second.precision == "bf16" and ModelConfig(**second.model) == model
    assert found.stage("third") is None and found.stage(None) is None


def test_a_checkpoint_that_names_no_run_has_an_empty_one() -> None:
    assert recorded_run({}) == recorded_run({"run": None}) == RecordedRun(None, 4096, (), ())
    assert recorded_run({"run": {"data": None, "tokenizer": None, "stages": []}}) == RecordedRun()


def test_fields_of_other_versions_do_not_matter() -> None:
    run = {"later": 1, "data": {"later": 2}, "stages": [{"name": "a", "model": {"later": 3}, "later": 4}]}
    assert recorded_run({"run": run}) == replace(RecordedRun(), stages=(RecordedStage("a", {"later": 3}),))


def test_a_manifest_of_the_first_format_is_read() -> None:
    (newest,) = (CHECKPOINT_V1 / "output" / "checkpoints" / "small").glob("step_*4")
    found = recorded_run(open_checkpoint(newest).manifest)
    assert [stage.name for stage in found.stages] == ["small"] and found.sequence_length == 32
    assert found.train == ("web", "code")
