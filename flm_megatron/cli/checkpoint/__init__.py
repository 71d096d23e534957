"""Inspect, verify, compare, re-shard, import and export checkpoints.

Started several times by `torchrun` or `srun`, the processes share the work.
"""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "inspect": "show what a checkpoint holds",
    "verify": "check files, checksums and structure",
    "diff": "compare two checkpoints tensor by tensor",
    "reshard": "copy to another file layout, dtype or format",
    "export-hf": "write a Hugging Face folder",
    "import-hf": "make a checkpoint of a Hugging Face folder",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint` and its commands."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"flm_megatron.cli.checkpoint.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=summary, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(action_run=module.run)


def run(args: argparse.Namespace) -> int:
    """Run one of the commands; returns the exit status."""
    return args.action_run(args)
