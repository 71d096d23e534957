"""Tables of what other programs' options are called here; with a checkout of a program, each is looked up there.

python -m tools.docs_site.other_programs megatron_lm CHECKOUT
python -m tools.docs_site.other_programs torchtitan CHECKOUT
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parent
MARK = "<!-- the table of names -->"
FLAG_SOURCES = ("megatron/training", "megatron/core/transformer", "megatron/core/model_parallel_config.py")
"""Where Megatron-LM defines flags: by name, and as fields of dataclasses that it makes flags of."""


@dataclass(frozen=True)
class Name:
    """An option with our field, what does the same here, or why nothing does."""

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


@dataclass(frozen=True)
class Table:
    """What a program's options are called here, out of `FILE.yaml`, for the page with `MARK`."""

    file: str
    page: str

    @property
    def said(self) -> dict[str, dict[str, object]]:
        """The file's sections: the program, what it was checked against, and its names."""
        loaded: dict[str, dict[str, object]] = yaml.safe_load((FOLDER / f"{self.file}.yaml").read_text("utf-8"))
        return loaded

    def names(self) -> list[Name]:
        """All options, in order."""
        found = self.said["names"]
        return [Name(topic, name, **each) for topic, named in found.items() for name, each in named.items()]  # type: ignore[attr-defined]

    def text(self) -> str:
        """The tables of all topics, and what they were checked against."""
        program, checked = self.said["program"], self.said["checked"]
        parts = [f"Names as of {program} {checked['commit']} ({checked['date']}).", ""]
        names = self.names()
        for topic in dict.fromkeys(each.topic for each in names):
            parts += [f"### {topic}", "", f"| {program} | here |", "|---|---|"]
            parts += [*(each.row() for each in names if each.topic == topic), ""]
        return "\n".join(parts)

    def missing(self, checkout: Path) -> Iterator[str]:
        """Options that a checkout of the program does not have."""
        sources = self.said.get("sources")
        for each in self.names():
            if sources is None:
                there = _is_flag(each.name, _source(checkout, FLAG_SOURCES))
            else:
                section, _, field = each.name.partition(".")
                there = _is_field(field, _source(checkout, (str(sources[section]),)))
            if not there:
                yield each.name


MEGATRON_LM = Table("megatron_lm", "from-megatron-lm.md")
TORCHTITAN = Table("torchtitan", "from-torchtitan.md")
TABLES = (MEGATRON_LM, TORCHTITAN)


def _source(checkout: Path, places: tuple[str, ...]) -> str:
    """The text of Python files, and of those in folders."""
    files = [file for place in places for file in sorted((checkout / place).rglob("*.py"))]
    files += [checkout / place for place in places if place.endswith(".py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _is_field(name: str, text: str) -> bool:
    """Whether a dataclass, of a module or within a class, has a field of this name."""
    return re.search(rf"^(?: {{4}}| {{8}}){name}\s*:", text, re.MULTILINE) is not None


def _is_flag(flag: str, text: str) -> bool:
    """Whether a parser has it, or a dataclass of whose fields flags are made."""
    field = flag.removeprefix("--").replace("-", "_")
    plain = field.removeprefix("no_").removeprefix("disable_")
    by_name = re.search(rf"['\"]{flag}['\"]", text)
    return bool(by_name) or any(_is_field(name, text) for name in (field, plain, f"add_{plain}"))


if __name__ == "__main__":
    (chosen,) = [each for each in TABLES if each.file == sys.argv[1]]
    gone = list(chosen.missing(Path(sys.argv[2])))
    print(f"not in {sys.argv[2]}: {', '.join(gone)}" if gone else f"all {len(chosen.names())} names are there")
    sys.exit(1 if gone else 0)
