"""Rehearse ranks of a run at their true size, on this machine."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import count, path, processes, take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm rehearse`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("run_file", type=path, help="run file (YAML)")
    parser.add_argument("--gpus", type=processes, required=True, help="processes that the run would have")
    parser.add_argument("--stage", help="rehearse only this stage")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--roles", action="store_true", help="one rank of every role (default)")
    which.add_argument("--rank", type=count, metavar="R", help="rank R alone")
    parser.add_argument("--workers", type=processes, metavar="N", help="processes of this machine (all processors)")
    parser.add_argument("--gpu", help="accelerator, such as a800, h100, mi300x: say how long the step takes there")
    parser.add_argument(
        "--nodes-of", type=processes, metavar="N", help="accelerators in a node (8 unless the table differs)"
    )
    parser.add_argument(
        "--hardware", type=path, metavar="FILE", help="YAML that changes what is assumed of the machine"
    )
    parser.add_argument("--trace", type=path, metavar="FILE", help="write the step as a Chrome trace (JSON)")
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw the step of all pipeline ranks (.png, .svg)")
    add_json(parser)
    take_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from flm_megatron.api.rehearse import rehearse
    from flm_megatron.checkpoint.run_file import open_run

    config = open_run(args.run_file, args.overrides)
    which = {name: getattr(args, name) for name in ("gpus", "stage", "rank", "workers")}
    timed = {name: getattr(args, name) for name in ("gpu", "nodes_of", "hardware", "trace", "plot")}
    found = rehearse(config, **which, **timed)
    print_json(found.to_dict()) if args.json else print(found)
    found.require_fit()
    return 0
