"""The stage that a checkpoint is changed into: one of a run file, or the checkpoint's own model with fields changed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import location, path

if TYPE_CHECKING:
    from flm_megatron.checkpoint.logical import LogicalCheckpoint
    from flm_megatron.config.overrides import Overrides
    from flm_megatron.config.schema import RunConfig


def add_changed_stage(parser: argparse.ArgumentParser, verb: str) -> None:
    """Arguments of a command that grows or shrinks a checkpoint (`verb`); any `--field value` is an override."""
    parser.add_argument("source", type=location, help="checkpoint of the stage before")
    parser.add_argument(
        "run_file", type=path, nargs="?", help=f"run file (YAML); without one, options say what {verb}s"
    )
    parser.add_argument("--stage", help=f"stage of the run file to {verb} into")
    parser.add_argument("--out", required=True, type=location, help="folder to write")
    parser.add_argument(
        "--certify", type=path, metavar="TEXT", help="text file on which logits and loss are compared first"
    )
    parser.set_defaults(accepts_overrides=True)


def changed_stage(
    args: argparse.Namespace, verb: str, lone: Callable[[LogicalCheckpoint, str, Overrides], RunConfig]
) -> tuple[RunConfig, str]:
    """The run, and the name of its stage to change into; `lone` makes the run where there is no run file.

    Raises:
        RequestError: a run file without a stage, or the other way round; or as `open_run` and `lone`.
    """
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.errors import RequestError

    if args.run_file:
        if not args.stage:
            raise RequestError(f"--stage is not given: name the stage of {args.run_file} to {verb} into")
        return open_run(args.run_file, args.overrides), args.stage
    require_no_stage(args)
    run = lone(open_checkpoint(args.source), str(args.source), args.overrides)
    return run, run.stages[1].name


def require_no_stage(args: argparse.Namespace) -> None:
    """Raise RequestError for a --stage without the run file that it is of."""
    from flm_megatron.errors import RequestError

    if args.stage:
        raise RequestError("--stage names a stage of a run file, and none is given: give one, or leave --stage out")
