"""Write a checkpoint shrunk into the next, smaller stage of a run file, or into what the options say.

Without a run file the options change the checkpoint's own model:
`flm shrink base --importance units.safetensors --out small --model.num_layers 20`.
"""

from __future__ import annotations

import argparse
import sys

from flm_megatron.cli.options.parser import path
from flm_megatron.cli.shape.changed_stage import add_changed_stage, changed_stage

EPILOG = """\
With an importance file, and without --certify, no model is built: torchrun or srun may start any number of processes on
CPU hosts, which share the work. Any field of the run file can be overridden: --stages.1.shrink.rescale_norms false.
Without a run file, options are fields of the smaller stage (--model.ffn_hidden_size 5120 --shrink.heads gradient), the
rest of its model is the checkpoint's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm shrink`; anything else of the form `--field value` overrides the run file."""
    add_changed_stage(parser, "shrink")
    parser.add_argument(
        "--importance",
        type=path,
        metavar="FILE",
        help="importance of units, written by `flm importance --out` (default: the stage's shrink.importance, else it "
        "is measured on the run's validation data)",
    )
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, write the checkpoint, and print a summary; returns 0."""
    from flm_megatron.api.shape.shrink import shrink
    from flm_megatron.distributed.launched import is_first_process
    from flm_megatron.growth.lone_change import lone_shrinking
    from flm_megatron.paths import require_folder

    require_folder(args.out, "--out")
    run, stage = changed_stage(args, "shrink", lone_shrinking)
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
        if shrunk.notice:
            print(f"WARNING: {shrunk.notice}", file=sys.stderr)
    return 0
