"""The checkpoints of a staged run, one for each stage."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError


def run_of(folder: Path) -> RunConfig:
    """The resolved run file of a run's output folder. Raises RequestError if there is none."""
    if not (folder / "run.yaml").is_file():
        raise RequestError(f"{folder} is not a run's output folder: it has no run.yaml")
    return load_run(folder / "run.yaml")


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
