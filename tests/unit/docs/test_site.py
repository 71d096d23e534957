"""The pages as a site: it builds without a warning, and every page is found from its navigation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flm_megatron.cli.main import COMMANDS
from flm_megatron.config.fields import all_fields
from tests.support import REPOSITORY
from tools.docs_site import links, megatron_lm


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; mkdocs is strict, so that a dead link or anchor ends it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return out


def test_pages_link_to_what_lies_elsewhere_in_the_repository(site: Path) -> None:
    assert (site / "growth" / "index.html").is_file()
    assert (site / "repository" / "benchmarks" / "growth" / "study" / "index.html").is_file()
    assert (site / "repository" / "benchmarks" / "growth" / "study.png").is_file()


def test_the_reference_has_every_field_and_every_command(site: Path) -> None:
    fields = (site / "reference" / "run-file" / "index.html").read_text()
    assert [field.path for field in all_fields() if f"<code>{field.path}</code>" not in fields] == []
    commands = (site / "reference" / "commands" / "index.html").read_text()
    assert [name for name in COMMANDS if f"usage: flm {name}" not in commands] == []


def test_every_page_stands_in_the_navigation() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(map(str, _leaves(yaml.safe_load(text)["nav"])))
    assert {page.name for page in (REPOSITORY / "docs").glob("*.md")} == {name for name in named if "/" not in name}


def _leaves(nav: object) -> list[object]:
    if isinstance(nav, list):
        return [leaf for entry in nav for leaf in _leaves(entry)]
    return [leaf for entry in nav.values() for leaf in _leaves(entry)] if isinstance(nav, dict) else [nav]


def test_every_flag_of_megatron_lm_leads_to_a_field_that_there_is(site: Path) -> None:
    fields, flags = {field.path for field in all_fields()}, megatron_lm.flags()
    assert [flag for flag in flags if flag.field is not None and flag.field not in fields] == []
    assert all(sum(map(bool, (flag.field, flag.instead, flag.none))) == 1 for flag in flags)
    page = (site / "from-megatron-lm" / "index.html").read_text()
    assert [flag.name for flag in flags if f"<code>{flag.name}</code>" not in page] == []


def test_a_flag_that_megatron_lm_does_not_have_is_noticed(tmp_path: Path) -> None:
    names = [flag.name for flag in megatron_lm.flags()]
    folder = tmp_path / "megatron" / "training"
    folder.mkdir(parents=True)
    (folder / "arguments.py").write_text("\n".join(f"add('{name}')" for name in names[1:]))
    for other in ("megatron/core/transformer", "megatron/core/model_parallel_config.py"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "megatron/core/model_parallel_config.py").touch()
    assert list(megatron_lm.missing(tmp_path)) == names[:1]


@pytest.mark.parametrize(
    ("page", "link", "moved"),
    [
        ("docs/growth.md", "../benchmarks/growth/study.md", "repository/benchmarks/growth/study.md"),
        ("docs/growth.md", "mup.md", "mup.md"),
        ("benchmarks/growth/study.md", "study.png", "study.png"),
        ("docs/growth.md", "../benchmarks/live/", "repository/benchmarks/live/README.md"),
        ("docs/growth.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/growth.md", "gone.md", "gone.md"),
    ],
)
def test_links_lead_to_the_places_of_the_site(page: str, link: str, moved: str) -> None:
    assert links.rewritten(page, f"see [this]({link}#part)") == f"see [this]({moved}#part)"


def test_code_blocks_are_left_as_they_are() -> None:
    text = "```\n[x](../benchmarks/live/)\n```\n"
    assert links.rewritten("docs/growth.md", text) == text
