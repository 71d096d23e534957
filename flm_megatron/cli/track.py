"""Send a run's metrics and events to its trackers: what was not sent while it trained, or all of it to another one."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path, take_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm track`."""
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--follow", action="store_true", help="go on while the run does, until Ctrl-C")
    take_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Send what is left; returns 1 if something could not be sent."""
    from flm_megatron.launch.tracking import track

    return 0 if track(args.run_dir, args.overrides, args.follow) else 1
