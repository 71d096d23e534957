"""Commands that have commands of their own: a module for each in the command's folder."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping


def add_actions(
    parser: argparse.ArgumentParser,
    folder: str,
    actions: Mapping[str, str],
    metavar: str = "COMMAND",
    formatter: type[argparse.HelpFormatter] = argparse.HelpFormatter,
) -> None:
    """Add `actions`, summaries by name, whose modules in `folder` (a package) have `add_arguments` and `run`.

    The `run` of the chosen one is in `run_action` of the arguments.
    """
    commands = parser.add_subparsers(dest="action", required=True, metavar=metavar)
    for name, summary in actions.items():
        module = importlib.import_module(f"{folder}.{name.replace('-', '_')}")
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=formatter, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(run_action=module.run)
