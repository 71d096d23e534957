"""Count the rows: `python -m tests.unit.cli.bad_input` prints how many bad inputs are tried, by command."""

from __future__ import annotations

from collections import Counter

from flm_megatron.cli import checkpoint, eval
from flm_megatron.cli.main import COMMANDS
from tests.unit.cli.bad_input import checkpoints, data, models, more, options, run_files

GROUPS = ("checkpoint", "data", "eval", "mup")
ACTIONS = {
    *checkpoint.COMMANDS,
    *eval.COMMANDS,
    "build",
    "tokenizer",
    "show",
    "screen",
    "stdlib",
    "coord-check",
    "search",
}


def command_of(arguments: str) -> str:
    """The command of a row, with its action where it has some; `flm` where it names none that there is."""
    words = arguments.split()
    if not words or words[0] not in COMMANDS:
        return "flm"
    action = words[0] in GROUPS and len(words) > 1 and words[1] in ACTIONS
    return " ".join(words[: 2 if action else 1])


if __name__ == "__main__":
    rows = [row for module in (options, run_files, data, checkpoints, models, more) for row in module.ROWS]
    counts = Counter(command_of(row.arguments) for row in rows)
    print("| command | bad inputs |\n|---|---:|")
    for command, count in sorted(counts.items()):
        print(f"| `{command}` | {count} |")
    print(f"| **all** | **{len(rows)}** |")
