"""Code blocks of the pages: commands are taken by the real parser, run files by the real loader.

A block that neither can take has a comment `<!-- not run: WHY -->` on the line before it. Whole sequences of commands
are run by tests of their own (bring-your-own.md, surgery.md's in the README).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from flm_megatron.cli.main import parsed
from flm_megatron.config.loader import load_run
from tests.support import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.M | re.S)
COMMENT = re.compile(r"(?:\s{2,}|\s#\s).*$")
OPTIONAL = re.compile(r"\[[^\]]*\]")


def blocks(kinds: set[str]) -> Iterator[tuple[str, str]]:
    """Page and text of every block of these kinds that is to be taken."""
    for page in PAGES:
        for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if found["kind"] in kinds and not found["why"]:
                yield page.name, found["text"]


def commands() -> Iterator[tuple[str, str]]:
    """Page and line of every command; what the program says begins with `flm COMMAND:`."""
    for page, text in blocks({"", "bash", "sh"}):
        for line in text.replace("\\\n", " ").splitlines():
            typed = OPTIONAL.sub("", COMMENT.sub("", line.strip())).partition(" > ")[0]
            if re.match(r"flm \w[\w-]*(?!\S)", typed):
                yield page, typed


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())), ids=lambda value: value)
def test_the_parser_takes_every_command(page: str, line: str) -> None:
    assert parsed(shlex.split(line)[1:]).command


@pytest.mark.parametrize(("page", "text"), list(blocks({"yaml"})), ids=lambda value: value.splitlines()[0])
def test_the_loader_takes_every_run_file(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    load_run(tmp_path / "run.yaml")


def test_what_is_not_taken_says_why() -> None:
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- not run: (.*) -->\n(```)?", page.read_text())]
    assert marks and all(why.strip() and fence for why, fence in marks)
