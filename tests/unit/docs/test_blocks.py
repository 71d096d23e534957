"""Code blocks of the pages: commands are taken by the real parser, run files by the real loader.

A block that neither can take has a comment `<!-- not run: WHY -->` on the line before it. Whole sequences of commands
are run by tests of their own (bring-your-own.md, surgery.md's in the README).
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import flm_megatron
from flm_megatron.cli.main import parsed
from flm_megatron.config.loader import load_run
from tests.support import REPOSITORY
from tools.docs_site import not_run

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
    assert len(marks) == len(list(not_run.marked()))


@pytest.mark.parametrize(("page", "text"), list(blocks({"python"})), ids=lambda value: value.splitlines()[0])
def test_python_is_sound_and_imports_what_there_is(page: str, text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    assert [node.attr for node in uses if node.value.id == "flm" and not hasattr(flm_megatron, node.attr)] == []  # type: ignore[attr-defined]
