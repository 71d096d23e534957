"""Inspect, verify, compare, re-shard, import and export checkpoints.

Started several times by `torchrun` or `srun`, the processes share the work.
"""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.actions import add_actions

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
    add_actions(parser, __name__, COMMANDS, metavar="ACTION")


def run(args: argparse.Namespace) -> int:
    """Run one of the commands; returns the exit status."""
    return args.run_action(args)
