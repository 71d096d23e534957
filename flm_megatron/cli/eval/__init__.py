"""Evaluate checkpoints: bits per byte, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.actions import add_actions

COMMANDS = {
    "bpb": "bits per byte of text, per domain and weighted",
    "harness": "tasks of lm-evaluation-harness",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of all of `flm eval`'s commands."""
    add_actions(parser, __name__, COMMANDS)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command."""
    return args.run_action(args)
