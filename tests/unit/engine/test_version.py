"""The installed megatron-core is of a series that the program knows, or one line says which to install."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

from flm_megatron.engine import version
from flm_megatron.errors import RequestError
from tests.support import REPOSITORY


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What was looked up is looked up again, before and after."""
    version.since.cache_clear()
    yield
    version.since.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    """Let `found` be the installed version, none for no megatron-core."""

    def installed(name: str) -> str:
        if found is None:
            raise version.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(version, "version", installed)


@pytest.mark.parametrize("found", ["0.15.0", "0.17.1", "0.18.2", "0.20.0", "1.0.0", None])
def test_another_version_is_one_clear_line(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, found)
    with pytest.raises(RequestError, match=r"^megatron-core .*pip install megatron-core==0\.\d+\.\d+$") as error:
        version.require_engine()
    assert "\n" not in str(error.value)
    assert (found or "not installed") in str(error.value)


@pytest.mark.parametrize(
    ("found", "newest"), [("0.16.1", False), ("0.16.2", False), ("0.19.0", True), ("0.19.2", True)]
)
def test_both_series_are_known(found: str, newest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, found)
    assert version.require_engine() == found
    assert version.since(0, 16) and version.since(0, 19) is newest


@pytest.mark.parametrize(
    ("python", "series"), [((3, 10), "0.16"), ((3, 11), "0.16"), ((3, 12), "0.19"), ((3, 13), "0.19")]
)
def test_the_release_to_install_fits_the_python(
    python: tuple[int, int], series: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", python)
    assert version.preferred() == version.SUPPORTED[series]


def test_the_releases_are_those_that_make_installs() -> None:
    pinned = re.findall(r"^megatron-core==(\S+);", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert sorted(pinned) == sorted(version.SUPPORTED.values())
