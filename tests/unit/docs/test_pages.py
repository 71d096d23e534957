"""What pages say is there: files, commands, targets of make, versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flm_megatron import __version__
from flm_megatron.cli.main import COMMANDS
from tests.unit.test_architecture import ROOMS

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "flm_megatron"
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
FOLDERS = {entry.name for entry in PACKAGE.iterdir() if entry.is_dir()} | {
    *("flm_megatron", "tests", "docs", "benchmarks", "examples", "tools")
}
GENERATED = {"reference/run-file.md", "reference/commands.md", "reference/exit-status.md"}
"""Pages that the site is built with (tools/docs_site/reference.py)."""
WORD = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")


def named(text: str) -> set[str]:
    """Paths in backquotes and pictures that begin with a folder of the project or of the package, and link targets."""
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    pictures = [line for block in re.findall(r"```\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    words = [word for piece in (*quoted, *pictures) for word in WORD.findall(piece) if "/" in word]
    return {word.rstrip("/.") for word in words if word.split("/")[0] in FOLDERS} | {
        target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target
    }


def exists(page: Path, path: str) -> bool:
    """Whether `path` is there: from the page's folder, the project or the package."""
    return path in GENERATED or any((base / path).exists() for base in (page.parent, ROOT, PACKAGE))


@pytest.mark.parametrize("name", PAGES)
def test_paths_that_a_page_names_exist(name: str) -> None:
    page = ROOT / name
    missing = sorted(path for path in named(page.read_text(encoding="utf-8")) if not exists(page, path))
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_commands_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    typed = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S) + re.findall(r"`([^`\n]+)`", text))
    assert set(re.findall(r"(?:^|bin/)flm ([a-z]+)", typed, flags=re.M)) <= set(COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"^make ([a-z-]+)", typed, flags=re.M)) <= targets


def test_the_changelog_knows_the_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert versions[0] == "Unreleased" and __version__ in versions


def test_the_architecture_shows_every_room_in_its_place() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, flags=re.M)) == ROOMS
    picture = text[text.index("## The rooms") : text.index("A room imports")]
    assert tuple(re.findall(rf"\b({'|'.join(ROOMS)})\b", picture.split("```")[1].replace("beside a run", ""))) == ROOMS


def test_a_path_that_is_gone_is_noticed() -> None:
    text = "See `training/gone.py`, [this](gone.md) and\n```\n  model/gone.py   what\n```\n"
    assert named(text) == {"training/gone.py", "gone.md", "model/gone.py"}
