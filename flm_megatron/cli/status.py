"""Show how a run stands, from its output folder alone: alive or not, loss, stage, growths, speed, goodput."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm status`."""
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="output folder of a run, on a disk that is seen")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="keep it up to date until the run ends or Ctrl-C")
    add_json(how)


def run(args: argparse.Namespace) -> int:
    """Show it; returns 0 whatever the run's state is."""
    from flm_megatron.evaluation.status.live import has_ended, show, terminal, watch
    from flm_megatron.evaluation.status.state import Reader

    if args.json:
        print_json(Reader(args.run_dir).read(settle=True).to_json())
    elif args.watch:
        watch(args.run_dir, terminal(), has_ended)
    else:
        show(args.run_dir, terminal())
    return 0
