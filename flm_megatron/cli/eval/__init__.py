"""Evaluate checkpoints: bits per byte, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "bpb": "bits per byte of text, per domain and weighted",
    "harness": "tasks of lm-evaluation-harness",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of all of `flm eval`'s commands."""
    commands = parser.add_subparsers(dest="eval_command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"flm_megatron.cli.eval.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(eval_run=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command."""
    return args.eval_run(args)
