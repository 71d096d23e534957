"""What the program says when it ends with status 1 or 2, out of its source: for looking up a line that one got."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "flm_megatron"
STATUSES = {"RequestError": 2, "DamagedError": 1, "FlmError": 1}
RULES = "config/rules"
"""Functions here return what is wrong with a run file."""


@dataclass(frozen=True)
class Message:
    """A message with `…` for what is filled in, the module that has it, and the exit status."""

    text: str
    module: str
    status: int

    @property
    def room(self) -> str:
        """The room, as docs/architecture.md names it."""
        return self.module.split("/", maxsplit=1)[0]


def messages() -> list[Message]:
    """All messages that are written out where they are raised, or returned by a rule."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).with_suffix("").as_posix()
        for node, status in _ends(ast.parse(path.read_text(encoding="utf-8")), module.startswith(RULES)):
            text = _template(node)
            if text and text.strip(" …"):
                found.append(Message(" ".join(text.split()), module, status))
    return list(dict.fromkeys(found))


def _ends(tree: ast.Module, rules: bool) -> Iterator[tuple[ast.expr, int]]:
    """Expressions of messages, with their exit status."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in STATUSES and node.args:
            yield node.args[0], STATUSES[node.func.id]
        elif rules and isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
            yield node.value, STATUSES["RequestError"]


def _template(node: ast.expr) -> str | None:
    """A text with its values as `…`; none for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or "…" for part in node.values)
    return None


def page() -> str:
    """The page of all messages, by room."""
    found = messages()
    parts = [
        "# Every error",
        "",
        f"{len(found)} messages of the program, with `…` where a value stands: what is wrong, the values, how to fix "
        "it. Search for a few words of the line that you got. [Status](exit-status.md) 2 is a request that is wrong, "
        "1 is damage or a failure.",
        "",
    ]
    for room in dict.fromkeys(each.room for each in found):
        parts += [f"## {room}", "", "| status | message | from |", "|---|---|---|"]
        parts += [f"| {each.status} | {_cell(each.text)} | `{each.module}.py` |" for each in found if each.room == room]
        parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """The text as it is, in a cell."""
    text = text.replace("`", "").replace("|", "\\|")
    return f"`{text}`"
