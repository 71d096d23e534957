"""The examples of docs/api.md and of the functions' docstrings do what they show."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import flm_megatron as flm
from tests.support.api_page import PAGE, blocks, write_trained

FUNCTIONS = [name for name in flm.__all__ if name[0].islower()]
OPTIONS = doctest.ELLIPSIS | doctest.REPORT_NDIFF


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's run file and a checkpoint of its first stage in an empty working folder."""
    write_trained(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_examples(test: doctest.DocTest) -> int:
    """How many examples ran; the first that shows something else is a failure."""
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append)
    assert not result.failed, "".join(report)
    return result.attempted


def test_examples_of_the_page(tiny: Path) -> None:
    text = "\n".join(blocks("pycon"))
    assert run_examples(doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)) > 25


@pytest.mark.parametrize("name", ["advise", "load_run", "open_checkpoint", "plan"])
def test_examples_of_docstrings(name: str, tiny: Path) -> None:
    function = getattr(flm, name)
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(function.__globals__))
    assert sum(map(run_examples, tests))


def test_docstrings_with_examples_are_all_run() -> None:
    assert {name for name in FUNCTIONS if ">>>" in str(getattr(flm, name).__doc__)} == {
        *("advise", "load_run", "open_checkpoint", "plan")
    }


def test_the_page_has_every_public_name() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in flm.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", text)]
