"""Check the maximal-update parametrization, and search hyperparameters for it."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "coord-check": "sizes of activations and updates against width; exit status 1 if they do not follow muP",
    "search": "random search of learning rates, initial standard deviations and multipliers on a narrow model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of all of `flm mup`'s commands."""
    commands = parser.add_subparsers(dest="mup_command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"flm_megatron.cli.mup.{name.replace('-', '_')}")
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(mup_run=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command."""
    return args.mup_run(args)
