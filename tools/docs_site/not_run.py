"""Code blocks of the pages that no test takes, and why: `python -m tools.docs_site.not_run` lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^<!-- not run: (.+) -->$", re.M)


def marked() -> Iterator[tuple[str, str]]:
    """Page and reason of every such block."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for reason in MARK.findall(page.read_text(encoding="utf-8")):
            yield page.relative_to(ROOT).as_posix(), reason


def page() -> str:
    """The list as a page."""
    found = list(marked())
    head = [
        "# Code blocks that no test takes",
        "",
        f"{len(found)} blocks; every other command goes through the real parser in the tests, every run file through "
        "the real loader, and Python is compiled, with what it imports.",
        "",
        "| page | why |",
        "|---|---|",
    ]
    return "\n".join([*head, *(f"| {place} | {reason} |" for place, reason in found), ""])


if __name__ == "__main__":
    print("\n".join(f"{place}: {reason}" for place, reason in marked()))
