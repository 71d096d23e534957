"""Write a checkpoint shrunk into the next, smaller stage of a run file, or into what the options say.

Without a run file the options change the checkpoint's own model:
`flm shrink base --importance units.safetensors --out small --model.num_layers 20`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import path

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig

EPILOG = """\
With an importance file, and without --certify, no model is built: torchrun or srun may start any number of processes on
CPU hosts, which share the work. Any field of the run file can be overridden: --stages.1.shrink.rescale_norms false.
Without a run file, options are fields of the smaller stage (--model.ffn_hidden_size 5120 --shrink.heads gradient), the
rest of its model is the checkpoint's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm shrink`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("source", type=path, help="checkpoint of the stage before")
    parser.add_argument("run_file", type=path, nargs="?", help="run file (YAML); without one, options say what shrinks")
    parser.add_argument("--stage", help="stage of the run file to shrink into")
    parser.add_argument("--out", required=True, type=path, help="folder to write")
    parser.add_argument(
        "--importance",
        type=path,
        metavar="FILE",
        help="importance of units, written by `flm importance --out` (default: the stage's shrink.importance, else it "
        "is measured on the run's validation data)",
    )
    parser.add_argument(
        "--certify", type=path, metavar="TEXT", help="text file on which logits and loss are compared first"
    )
    parser.epilog = EPILOG
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, write the checkpoint, and print a summary; returns 0."""
    from flm_megatron.api.shape.shrink import shrink
    from flm_megatron.distributed.launched import is_first_process
    from flm_megatron.paths import require_folder

    require_folder(args.out, "--out")
    run, stage = _asked_for(args)
    shrunk = shrink(
        args.source,
        run,
        stage,
        args.out,
        importance=args.importance,
        certify=args.certify,
        on_certificate=lambda certificate: print(certificate.table("shrinking")),
    )
    if is_first_process():
        kept = ", ".join(map(str, shrunk.plan.layers.indices(0).tolist()))
        print(f"{args.out}: stage {shrunk.plan.stage}, keeps layers {kept} of {shrunk.plan.old.num_layers}")
        print(f"logical hash {shrunk.logical_hash}")
    return 0


def _asked_for(args: argparse.Namespace) -> tuple[RunConfig, str]:
    """The run, and the stage of it to shrink into."""
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.errors import RequestError
    from flm_megatron.growth.lone_change import lone_shrinking

    if args.run_file:
        if not args.stage:
            raise RequestError(f"--stage is not given: name the stage of {args.run_file} to shrink into")
        return open_run(args.run_file, args.overrides), args.stage
    if args.stage:
        raise RequestError("--stage names a stage of a run file, and none is given: give one, or leave --stage out")
    run = lone_shrinking(open_checkpoint(args.source), str(args.source), args.overrides)
    return run, run.stages[1].name
