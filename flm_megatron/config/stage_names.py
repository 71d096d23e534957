"""Stages by their names, as a command line or a checkpoint gives them."""

from __future__ import annotations

from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import RequestError


def stage_index(run: RunConfig, name: str) -> int:
    """Place of the stage called `name`. Raises RequestError, with the names that there are, if there is none."""
    names = [stage.name for stage in run.stages]
    if name not in names:
        raise RequestError(f"no stage is named {name!r}; the run has {', '.join(names)}")
    return names.index(name)
