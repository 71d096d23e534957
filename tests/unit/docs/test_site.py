"""The pages as a site: it builds without a warning, and every page is found from its navigation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

from flm_megatron.cli.main import COMMANDS
from flm_megatron.config.fields import all_fields
from tests.support import REPOSITORY
from tools.docs_site import growth_pictures, links, messages
from tools.docs_site.other_programs import MEGATRON_LM, TABLES, TORCHTITAN, Table


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


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.file)
def test_every_name_of_another_program_leads_to_a_field_that_there_is(site: Path, table: Table) -> None:
    fields, names = {field.path for field in all_fields()}, table.names()
    assert [each for each in names if each.field is not None and each.field not in fields] == []
    assert all(sum(map(bool, (each.field, each.instead, each.none))) == 1 for each in names)
    page = (site / table.page.removesuffix(".md") / "index.html").read_text()
    assert [each.name for each in names if f"<code>{each.name}</code>" not in page] == []


def test_a_name_that_the_program_does_not_have_is_noticed(tmp_path: Path) -> None:
    flags = [each.name for each in MEGATRON_LM.names()]
    arguments = tmp_path / "megatron" / "training" / "arguments.py"
    arguments.parent.mkdir(parents=True)
    arguments.write_text("\n".join(f"add('{name}')" for name in flags[1:]))
    assert list(MEGATRON_LM.missing(tmp_path)) == flags[:1]

    options = [each.name for each in TORCHTITAN.names()]
    for name in options[1:]:
        section, field = name.split(".")
        path = tmp_path / str(TORCHTITAN.said["sources"][section])
        path = path if path.suffix else path / "base.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            print(f"    {field}: int = 1", file=file)
    assert list(TORCHTITAN.missing(tmp_path)) == options[:1]


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


def test_the_site_shows_the_picture_of_its_theme(site: Path) -> None:
    page = (site / "growth" / "index.html").read_text()
    for name in ("matrix", "masks", "layers", "certificate"):
        assert f"pictures/growth-{name}-light.png#only-light" in page
        assert f"pictures/growth-{name}-dark.png#only-dark" in page
    lone = "![x](pictures/report-light.png) ![y](pictures/report-dark.png)"
    assert links.with_dark_twins("docs/report.md", lone) == lone
    assert links.with_dark_twins("docs/report.md", "![x](none-light.png)") == "![x](none-light.png)"


@pytest.mark.parametrize("name", growth_pictures.DRAWN)
def test_pictures_are_what_the_program_does(tmp_path: Path, name: str) -> None:
    growth_pictures.draw(name, *growth_pictures.DRAWN[name], tmp_path)
    for theme in growth_pictures.THEMES:
        drawn = imread(tmp_path / f"{name}-{theme}.png")
        kept = imread(growth_pictures.PICTURES / f"{name}-{theme}.png")
        assert drawn.shape == kept.shape and abs(drawn - kept).mean() < 0.01


def test_the_old_block_stays_and_zero_writes_nothing_new() -> None:
    before, zero, mask, clone = (pair for _, pair, _ in growth_pictures.matrices())
    (rows, columns), (channels, units) = before[0].shape, before[1].shape
    assert not zero[1][channels:].any() and not zero[1][:, units:].any() and mask[1][channels:].all()
    assert (mask[0][:rows, :columns] == before[0]).all()
    assert (clone[0][:rows, columns : 2 * columns] == clone[0][:rows, :columns]).all()


def test_every_error_stands_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "errors" / "index.html").read_text()
    for words in ("megatron-core is not installed; …", "is not in the container: add its folder to --mounts"):
        assert words in page
    found = messages.messages()
    assert len(found) > 600 and {each.status for each in found} == {1, 2}
    assert all("\n" not in each.text for each in found)
