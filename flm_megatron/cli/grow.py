"""Write a checkpoint grown into the next stage of a run file."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path

EPILOG = """\
Without --certify, and unless layers are chosen by distance, no model is built: torchrun or srun may start any number
of processes on CPU hosts, which share the work. Any field of the run file can be overridden:
--stages.1.growth.layers mask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm grow`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("source", type=path, help="checkpoint of the stage before")
    parser.add_argument("run_file", type=path, help="run file (YAML)")
    parser.add_argument("--stage", required=True, help="stage to grow into")
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
    from flm_megatron.api.grow import grow
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.distributed.launched import is_first_process
    from flm_megatron.paths import require_folder

    require_folder(args.out, "--out")
    grown = grow(
        args.source,
        open_run(args.run_file, args.overrides),
        args.stage,
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
