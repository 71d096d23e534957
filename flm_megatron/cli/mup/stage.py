"""The stage that a command about muP works on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig, StageConfig


def chosen_stage(run_config: RunConfig, args: argparse.Namespace) -> StageConfig:
    """The stage named in the arguments, or the first."""
    from flm_megatron.config.stage_names import stage_index
    from flm_megatron.errors import RequestError

    if not run_config.stages:
        raise RequestError(f"{args.run_file} has no stages")
    return run_config.stages[0 if args.stage is None else stage_index(run_config, args.stage)]
