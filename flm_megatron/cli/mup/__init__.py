"""Check the maximal-update parametrization, and search hyperparameters for it."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.actions import add_actions

COMMANDS = {
    "coord-check": "sizes of activations and updates against width; exit status 1 if they do not follow muP",
    "search": "random or grid search of learning rates, initial standard deviations and multipliers on a narrow model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of all of `flm mup`'s commands."""
    add_actions(parser, __name__, COMMANDS, formatter=argparse.ArgumentDefaultsHelpFormatter)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command."""
    return args.run_action(args)
