"""Links of pages to what lies elsewhere in the repository, so that the site holds all that they lead to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = "docs"
ELSEWHERE = "repository"
"""Folder of the site that holds files from outside docs/."""
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_LIGHT = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)-light(\.\w+)\)")
_FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site's sources: `docs/growth.md` as `growth.md`."""
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"{ELSEWHERE}/{path}"


def target_of(page: str, link: str) -> str | None:
    """The path in the repository that a link of the page at `page` leads to; none if it leads out of it, or nowhere.

    A folder stands for its README.md.
    """
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def linked(page: str) -> set[str]:
    """Paths in the repository that the page at `page` links to."""
    found: set[str] = set()

    def note(link: str) -> str:
        """Keep what it leads to, and leave it as it is."""
        if target := target_of(page, link):
            found.add(target)
        return link

    _each(page_text(page), note)
    return found


def reached(pages: set[str]) -> set[str]:
    """All files that the pages lead to, by links of pages that they lead to as well."""
    seen, waiting = set(pages), list(pages)
    while waiting:
        page = waiting.pop()
        if page.endswith(".md"):
            new = linked(page) - seen
            seen |= new
            waiting += new
    return seen


def rewritten(page: str, text: str) -> str:
    """The text of the page at `page` with its links as the site has them."""
    here = posixpath.dirname(place_of(page))

    def moved(link: str) -> str:
        """The link between the two places in the site."""
        target = target_of(page, link)
        return link if target is None else posixpath.relpath(place_of(target), here or ".")

    return _each(text, moved)


def with_dark_twins(page: str, text: str) -> str:
    """The text with the dark picture beside each light one that has it, so that the site shows what fits its theme.

    Elsewhere the light picture alone is shown. One whose dark twin has a place of its own on the page is left alone.
    """

    def paired(at: re.Match[str]) -> str:
        """Both pictures, marked for their themes."""
        dark = f"{at[2]}-dark{at[3]}"
        if dark in text or target_of(page, dark) is None:
            return at[0]
        return f"![{at[1]}]({at[2]}-light{at[3]}#only-light)\n![{at[1]}]({dark}#only-dark)"

    return _LIGHT.sub(paired, text)


def page_text(page: str) -> str:
    """The text of a page of the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def _each(text: str, change: Callable[[str], str]) -> str:
    """The text with every link outside of code blocks changed."""
    parts = _FENCE.split(text)
    for index in range(0, len(parts), 2):
        parts[index] = _LINK.sub(lambda at: f"{at[1]}{change(at[2])}{at[3] or ''}{at[4]}", parts[index])
    return "".join(parts)
