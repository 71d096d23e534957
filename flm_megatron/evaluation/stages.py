"""The checkpoints of a staged run, one for each stage."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.run_folder import run_of


def last_checkpoints(folder: Path) -> list[Path]:
    """The newest checkpoint that can be loaded of each stage that has one, in the order of the stages.

    Raises:
        RequestError: the folder is no run's, or no stage has a checkpoint.
    """
    store = CheckpointStore(folder / "checkpoints")
    found = [store.latest([stage.name]) for stage in run_of(folder).stages]
    checkpoints = [path for path in found if path is not None]
    if not checkpoints:
        raise RequestError(f"{folder} has no checkpoint yet")
    return checkpoints
