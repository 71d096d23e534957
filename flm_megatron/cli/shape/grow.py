"""Write a checkpoint grown into the next stage of a run file, or into what the options say.

Without a run file the options change the checkpoint's own model: `flm grow base --out grown --model.num_layers 40`.
"""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path
from flm_megatron.cli.shape.changed_stage import add_changed_stage, changed_stage

EPILOG = """\
Without --certify, and unless layers are chosen by distance, no model is built: torchrun or srun may start any number
of processes on CPU hosts, which share the work. Any field of the run file can be overridden:
--stages.1.growth.layers mask. Without a run file, options are fields of the grown stage (--model.hidden_size 5120
--growth.ffn clone), the rest of its model is the checkpoint's, and operators are `zero` where not given: masks open
over the steps of a stage, so they need a run file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm grow`; anything else of the form `--field value` overrides the run file."""
    add_changed_stage(parser, "grow")
    parser.add_argument(
        "--distances", type=path, metavar="FILE", help="layer distances written by `flm distance --out`"
    )
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for, write the checkpoint, and print a summary; returns 0."""
    from flm_megatron.api.shape.grow import grow
    from flm_megatron.distributed.launched import is_first_process
    from flm_megatron.growth.lone_change import lone_growth
    from flm_megatron.paths import require_folder

    require_folder(args.out, "--out")
    run, stage = changed_stage(args, "grow", lone_growth)
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
