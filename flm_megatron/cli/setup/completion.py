"""Print a script by which a shell completes commands, options, fields of the run file, and paths.

Bash: `flm completion bash > ~/.local/share/bash-completion/completions/flm`. Zsh: into a file `_flm` of a folder in
$fpath. Or, for one shell: `source <(flm completion bash)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm completion`."""
    parser.add_argument("shell", choices=SHELLS, help="shell to write for")


def run(args: argparse.Namespace) -> int:
    """Print the script; returns 0."""
    import shtab

    from flm_megatron.cli.main import whole_parser

    parser = whole_parser()
    for command in _parsers(parser):
        if command.get_default("accepts_overrides"):
            _add_fields(command)
        _complete_paths(command)
    print(shtab.complete(parser, shell=args.shell))
    return 0


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands, at every depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _parsers(command)


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let the shell complete paths wherever an argument is one."""
    import shtab

    from flm_megatron.cli.options.parser import location, path, place, template

    for action in parser._actions:
        if action.type in (location, path, place, template):
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """Make options of the fields of the run file; those of stages are of the first."""
    from flm_megatron.config.fields import all_fields

    known = {option for action in parser._actions for option in action.option_strings}
    for field in all_fields():
        option = "--" + (f"stages.0.{field.path[7:]}" if field.path.startswith("stages.") else field.path)
        if field.type != "section" and option not in known and field.path != "stages":
            parser.add_argument(option, help=argparse.SUPPRESS if not field.help else field.help.split("\n")[0])
