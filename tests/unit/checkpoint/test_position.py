"""Where a checkpoint stands: what is known is written in order and read back, what is not known is left out."""

from __future__ import annotations

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.position import StagePosition, recorded_position
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig
from tests.fixtures import CHECKPOINT_V1


def test_a_position_is_written_after_the_run_and_read_back() -> None:
    position = StagePosition(step=0, samples=2, tokens=3, optimizer_step=4)
    manifest = stage_manifest(RunConfig(stages=[StageConfig(name="a")]), 0, ModelConfig(vocab_size=9), position)
    assert list(manifest) == ["run", "stage", "step", "samples", "tokens", "optimizer_step"]
    assert recorded_position(manifest) == StagePosition(0, 2, 3, 4, "a")


def test_what_is_not_known_is_left_out() -> None:
    assert recorded_position({}) == StagePosition() and StagePosition().to_json() == {}
    assert StagePosition(7, stage="a").to_json() == {"stage": "a", "step": 7}
    assert recorded_position({"step": 7, "tokens": None}) == StagePosition(7)


def test_a_manifest_of_the_first_format_is_read() -> None:
    (path,) = (CHECKPOINT_V1 / "output" / "checkpoints" / "small").glob("step_*4")
    assert recorded_position(open_checkpoint(path).manifest) == StagePosition(4, 16, 512, 4, "small")
