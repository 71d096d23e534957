"""Advise whether, when, out of what size and by which operator to grow into the last model of a run."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import path, processes, real, take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm advise`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("run_file", type=path, help="run file (YAML); its last stage is the model to train")
    known = parser.add_mutually_exclusive_group()
    known.add_argument(
        "--pilot",
        nargs="+",
        type=path,
        default=[],
        metavar="RUN_DIR",
        help="runs from scratch, to which loss laws are fitted: of both sizes, or of at least three",
    )
    known.add_argument(
        "--laws",
        type=path,
        metavar="FILE",
        help="YAML of loss laws by stage, as for `flm plan`, or of one law of all sizes (floor, size_scale, "
        "size_exponent, scale, exponent); the fits of arXiv 2203.15556 and 2404.10102 without it",
    )
    parser.add_argument(
        "--budget",
        type=real(0.0, above=True),
        metavar="FLOPS",
        help="FLOPs from scratch (those of the last stage's model and tokens)",
    )
    parser.add_argument(
        "--credit", type=path, metavar="FILE", help="JSON table of what operators keep (the program's own)"
    )
    parser.add_argument("--gpu", help="accelerator, such as a800: count GPU-hours in place of FLOPs; with --gpus")
    parser.add_argument("--gpus", type=processes, help="how many")
    parser.add_argument("--nodes-of", type=processes, metavar="N", help="accelerators in a node")
    parser.add_argument(
        "--hardware", type=path, metavar="FILE", help="YAML that changes what is assumed of the machine"
    )
    add_json(parser)
    take_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Print the advice; returns 0."""
    from flm_megatron.api.budget.advise import advise
    from flm_megatron.checkpoint.run_file import open_run

    given = {name: getattr(args, name) for name in ("laws", "credit", "budget", "gpu", "gpus", "nodes_of", "hardware")}
    advice = advise(open_run(args.run_file, args.overrides), pilots=args.pilot, **given)
    print_json(advice.to_dict()) if args.json else print(advice)
    return 0
