"""Pages that the program writes of itself: fields of the run file, commands, exit statuses, errors."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from flm_megatron import errors
from flm_megatron.cli.main import COMMANDS, command_parser
from flm_megatron.config.fields import all_fields
from tools.docs_site import messages, not_run

COLUMNS = "100"
"""Width of the help texts."""


def pages() -> dict[str, str]:
    """Every page by its place in the site's sources."""
    return {
        "reference/run-file.md": _run_file(),
        "reference/commands.md": _commands(),
        "reference/exit-status.md": _exit_status(),
        "reference/errors.md": messages.page(),
        "reference/not-run.md": not_run.page(),
    }


def _run_file() -> str:
    rows = [
        f"| `{field.path}` | {_cell(field.type)} | `{_cell(str(field.default))}` | {_cell(field.help)} |"
        for field in all_fields()
    ]
    head = ["# Every field of a run file", "", "As `flm config` prints them.", ""]
    return "\n".join([*head, "| field | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _commands() -> str:
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), COLUMNS
    try:
        parts = ["# Every command", "", *(f"- `flm {name}`: {summary}" for name, summary in COMMANDS.items()), ""]
        for name in COMMANDS:
            for title, text in _helps(f"flm {name}", command_parser(name)):
                parts += [f"## {title}", "", "```text", text.rstrip(), "```", ""]
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return "\n".join(parts)


def _helps(title: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """The help of a command and of its actions."""
    yield title, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _helps(f"{title} {name}", inner)


def _exit_status() -> str:
    kinds: list[type[errors.FlmError]] = [errors.RequestError, errors.Mistakes, errors.DamagedError, errors.FlmError]
    rows = [f"| `{kind.__name__}` | {kind.status} | {_cell((kind.__doc__ or '').strip())} |" for kind in kinds]
    return "\n".join(
        [
            "# Exit status and errors",
            "",
            "| status | meaning |",
            "|---|---|",
            "| 0 | done |",
            "| 1 | failed, or stored data is damaged |",
            "| 2 | the request is wrong: one line says what, the values, and how to fix it |",
            "| 3 | stopped by a signal after saving: the same command goes on |",
            "",
            "In Python the same are exceptions of `flm_megatron`:",
            "",
            "| exception | status | |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
