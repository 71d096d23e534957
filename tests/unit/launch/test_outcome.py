"""The last words of a run."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.distributed.signals import STOPPED
from flm_megatron.launch.outcome import last_words


def test_the_newest_checkpoint_is_named_also_where_its_step_was_saved_again(tmp_path: Path) -> None:
    run = RunConfig(stages=[StageConfig(name="s"), StageConfig(name="t")], output=str(tmp_path))
    assert "none yet" in last_words(run, STOPPED)[1]
    folder = tmp_path / "checkpoints" / "s"
    for name in ("step_00000004", "step_00000008.1", "step_00000008.2", "step_00000008.2.partial"):
        (folder / name).mkdir(parents=True)
    assert last_words(run, STOPPED)[1].split()[-1] == str(folder / "step_00000008.2")
