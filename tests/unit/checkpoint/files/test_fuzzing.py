"""A few seconds of fuzzing, and that the fuzzer would see what it looks for."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.errors import DamagedError
from tests.fuzzing import watch
from tests.fuzzing.run import Fuzzer
from tests.fuzzing.targets import Target, all_targets, check_data
from tests.fuzzing.watch import Violation, Watch, differences, snapshot

SECONDS = 4.0


def test_nothing_that_is_read_does_more_than_being_read(tmp_path: Path) -> None:
    fuzzer = Fuzzer(all_targets(tmp_path), seed=1)
    fuzzer.run(SECONDS, warm_up=5)
    assert not fuzzer.findings
    assert fuzzer.number > 1000
    assert all(outcome["accepted"] and outcome["refused"] for outcome in fuzzer.outcomes.values())


class Reads(Target):
    """A target that does what it is given."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def input(self, draw: object) -> bytes:
        """Any."""
        return b"x"

    def read(self, data: bytes) -> None:
        """Act."""
        check_data(self.act())


def pollute() -> None:
    argparse.Namespace.owned = True  # type: ignore[attr-defined]


def refuse() -> None:
    raise DamagedError("as it should be")


@pytest.mark.parametrize(
    ("act", "finding"),
    [
        (pollute, "changed <class 'argparse.Namespace'>"),
        (lambda: open(os.devnull).close(), "caused open"),
        (lambda: os.system("true"), "caused os.system"),
        (lambda: eval("1"), "caused compile"),
        (lambda: [os.system], "made a"),
        (lambda: {"x": (argparse.Namespace,)}, "made a"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: sum(range(10**7)), "took"),
        (refuse, ""),
    ],
)
def test_the_fuzzer_sees_what_it_looks_for(
    act: Callable[[], object], finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MOST_SECONDS", 0.05)
    fuzzer = Fuzzer({"target": Reads(act)}, seed=1)
    try:
        fuzzer.one("target")
    finally:
        if hasattr(argparse.Namespace, "owned"):
            del argparse.Namespace.owned
    assert [finding in found["what"] for found in fuzzer.findings] == ([True] if finding else [])


def test_a_changed_attribute_of_any_module_or_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.setattr(time, "sleep", None)
    monkeypatch.setattr(Watch, "input", None)
    monkeypatch.setattr(Violation, "owned", True, raising=False)
    assert {change.split()[-1].rsplit(".")[-1] for change in differences(before, snapshot())} == {
        "sleep",
        "input",
        "owned",
    }
