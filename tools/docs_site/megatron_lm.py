"""The table of Megatron-LM's flags against our fields; run with a checkout of it, looks each flag up there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("megatron_lm.yaml")
SOURCES = ("megatron/training", "megatron/core/transformer", "megatron/core/model_parallel_config.py")
"""Where Megatron-LM defines flags: by name, and as fields of dataclasses that it makes flags of."""
PAGE = "from-megatron-lm.md"
MARK = "<!-- the table of flags -->"


@dataclass(frozen=True)
class Flag:
    """A flag with our field, what does the same here, or why nothing does."""

    topic: str
    name: str
    field: str | None = None
    instead: str | None = None
    none: str | None = None
    note: str = ""

    def row(self) -> str:
        """Its line of the table."""
        if self.field:
            place = f"[`{self.field}`](reference/run-file.md)"
            return f"| `{self.name}` | {place}{f': {self.note}' if self.note else ''} |"
        return f"| `{self.name}` | {self.instead or f'not here: {self.none}'} |"


def flags() -> list[Flag]:
    """All flags of the table, in order."""
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))["flags"]
    return [Flag(topic, name, **said) for topic, named in found.items() for name, said in named.items()]


def table() -> str:
    """The tables of all topics, and what they were checked against."""
    checked = yaml.safe_load(FILE.read_text(encoding="utf-8"))["checked"]
    parts = [f"Flags as of Megatron-LM {checked['commit']} ({checked['date']}).", ""]
    for topic in dict.fromkeys(flag.topic for flag in flags()):
        parts += [f"### {topic}", "", "| Megatron-LM | here |", "|---|---|"]
        parts += [*(flag.row() for flag in flags() if flag.topic == topic), ""]
    return "\n".join(parts)


def missing(checkout: Path) -> Iterator[str]:
    """Flags that a checkout of Megatron-LM does not have."""
    files = [file for source in SOURCES for file in sorted((checkout / source).rglob("*.py"))]
    files += [checkout / source for source in SOURCES if source.endswith(".py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for flag in flags():
        field = flag.name.removeprefix("--").replace("-", "_")
        plain = field.removeprefix("no_").removeprefix("disable_")
        by_name = re.search(rf"['\"]{flag.name}['\"]", text)
        if not by_name and not re.search(rf"^    (?:{field}|{plain}|add_{plain})\s*:", text, re.M):
            yield flag.name


if __name__ == "__main__":
    gone = list(missing(Path(sys.argv[1])))
    print(f"not in {sys.argv[1]}: {', '.join(gone)}" if gone else f"all {len(flags())} flags are there")
    sys.exit(1 if gone else 0)
