"""The run file in a run's output folder."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError


def run_of(folder: Path) -> RunConfig:
    """The resolved run file of a run's output folder. Raises RequestError if there is none."""
    if not (folder / "run.yaml").is_file():
        raise RequestError(f"{folder} is not a run's output folder: it has no run.yaml")
    return load_run(folder / "run.yaml")
