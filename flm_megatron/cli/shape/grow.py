"""Write a checkpoint grown into the next stage of a run file, or into what the options say.

Without a run file the options change the checkpoint's own model: `flm grow base --out grown --model.num_layers 40`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import path

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig

EPILOG = """\
Without --certify, and unless layers are chosen by distance, no model is built: torchrun or srun may start any number
of processes on CPU hosts, which share the work. Any field of the run file can be overridden:
--stages.1.growth.layers mask. Without a run file, options are fields of the grown stage (--model.hidden_size 5120
--growth.ffn clone), the rest of its model is the checkpoint's, and operators are `zero` where not given: masks open
over the steps of a stage, so they need a run file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm grow`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("source", type=path, help="checkpoint of the stage before")
    parser.add_argument("run_file", type=path, nargs="?", help="run file (YAML); without one, options say what grows")
    parser.add_argument("--stage", help="stage of the run file to grow into")
    parser.add_argument("--out", required=True, type=path, help="folder to write")
    parser.add_argument(
        "--certify", type=path, metavar="TEXT", help="text file on which logits and loss are compared first"
    )
    parser.add_argument(
        "--distances", type=path, metavar="FILE", help="layer distances written by `flm distance --out`"
    )
    parser.epilog = EPILOG
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, write the checkpoint, and print a summary; returns 0."""
    from flm_megatron.api.shape.grow import grow
    from flm_megatron.distributed.launched import is_first_process
    from flm_megatron.paths import require_folder

    require_folder(args.out, "--out")
    run, stage = _asked_for(args)
    grown = grow(
        args.source,
        run,
        stage,
        args.out,
        certify=args.certify,
        distances=args.distances,
        on_certificate=lambda certificate: print(certificate.table()),
    )
    if is_first_process():
        layers = [str(layer) for layer in grown.plan.layer_sources]
        print(f"{args.out}: stage {grown.plan.stage}, layers from {', '.join(layers)}")
        print(f"logical hash {grown.logical_hash}")
    return 0


def _asked_for(args: argparse.Namespace) -> tuple[RunConfig, str]:
    """The run, and the stage of it to grow into."""
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.errors import RequestError
    from flm_megatron.growth.lone_change import lone_growth

    if args.run_file:
        if not args.stage:
            raise RequestError(f"--stage is not given: name the stage of {args.run_file} to grow into")
        return open_run(args.run_file, args.overrides), args.stage
    if args.stage:
        raise RequestError("--stage names a stage of a run file, and none is given: give one, or leave --stage out")
    run = lone_growth(open_checkpoint(args.source), str(args.source), args.overrides)
    return run, run.stages[1].name
