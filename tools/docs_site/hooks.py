"""What mkdocs calls while it builds the site (mkdocs.yml)."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.docs_site import links, other_programs, reference  # noqa: E402


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add generated pages, and every file of the repository that pages lead to."""
    for place, text in reference.pages().items():
        files.append(File.generated(config, place, content=text))
    own = {f"{links.DOCS}/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None}
    for path in sorted(links.reached(own)):
        place = links.place_of(path)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the site has what they lead to."""
    place = page.file.src_uri
    if place.startswith("reference/"):
        return markdown
    for table in other_programs.TABLES:
        if place == table.page:
            markdown = markdown.replace(other_programs.MARK, table.text())
    elsewhere = place.startswith(f"{links.ELSEWHERE}/")
    path = place.removeprefix(f"{links.ELSEWHERE}/") if elsewhere else f"{links.DOCS}/{place}"
    return links.rewritten(path, links.with_dark_twins(path, markdown))
