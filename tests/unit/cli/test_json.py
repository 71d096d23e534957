"""`--json`: one document on standard output, of every command that prints a table; docs/command-line.md names each."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flm_megatron.benchmarking.report import Report
from flm_megatron.cli.main import main, whole_parser
from flm_megatron.cli.options.output import print_json
from flm_megatron.config.schema import StageConfig
from flm_megatron.evaluation.harness import run as harness
from tests.support import REPOSITORY
from tests.support.checkpoint_cases import write_small
from tests.support.run_folder import make_run_folder
from tests.support.runs import flm, make_data, make_run

TINY = "examples/tiny.yaml"
PAGE = REPOSITORY / "docs" / "command-line.md"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


def test_the_page_names_every_command_with_json() -> None:
    having = {each.prog for each in parsers(whole_parser()) if "--json" in each._option_string_actions}
    named = set(re.findall(r"^\| `(flm [a-z -]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M))
    assert named == having


def keys_on_the_page(command: str) -> list[str]:
    """The keys that the page has for a command."""
    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{command}` |"))
    return re.findall(r"`(\w+)`", row.split("|")[2])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a run file, a run's folder and a checkpoint."""
    folder = tmp_path_factory.mktemp("place")
    make_run(make_data(folder / "data"), folder / "run")
    make_run(folder / "data", folder / "mup", "--stages.0.model.mup.enabled", "true")
    make_run_folder(folder / "done", 25)
    write_small(folder / "small")
    return folder


COMMANDS = {
    "flm config": "config --field stages.parallel",
    "flm data verify": "data verify {place}/data/train {place}/data/validation",
    "flm checkpoint inspect": "checkpoint inspect {place}/small",
    "flm checkpoint verify": "checkpoint verify {place}/small",
    "flm checkpoint diff": "checkpoint diff {place}/small {place}/small",
    "flm doctor": "doctor {place}/run/test.yaml",
    "flm plan": "plan {place}/run/test.yaml --gpu a800 --gpus 2",
    "flm advise": "advise {place}/run/test.yaml --stages.0.tokens 1e6",
    "flm status": "status {place}/done",
}


SLOW = {
    "flm rehearse": "rehearse {place}/run/test.yaml --gpus 2",
    "flm bench": "bench {place}/run/test.yaml --steps 1 --warmup 0 --profile 1",
    "flm mup coord-check": "mup coord-check --widths 16 32 64 --steps 1 --seeds 1 --layers 1 --plot {place}/c.png "
    "--tolerance 9",
    "flm mup search": "mup search {place}/mup/test.yaml --trials 2 --steps 4 --width 16",
}


@pytest.mark.parametrize("command", [*COMMANDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_standard_output_is_one_document_with_the_keys_of_the_page(place: Path, command: str) -> None:
    done = flm(*(COMMANDS | SLOW)[command].format(place=place).split(), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(found, dict)
    wanted = keys_on_the_page(command)
    assert wanted or command in ("flm config", "flm data verify")
    assert set(wanted) <= set(found), sorted(found)


def test_a_checkpoint_of_another_tokenizer_is_refused_in_a_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("distance", "importance"):
        assert main([command, str(place / "small"), str(place / "run" / "test.yaml"), "--json"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and "500 ids, the model of the checkpoint has" in said.err


def test_what_json_does_not_have_becomes_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "x"}


def no_such_number(name: str) -> None:
    """What JSON does not have."""
    raise AssertionError(f"{name} is not JSON")


def test_that_of_evaluation_and_of_benchmarks_does_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    harness._show(
        harness.HarnessRequest([], [], json=Path("-")),
        {"a": {"results": {"task": {"acc,none": math.nan}}, "samples": {}}},
    )
    found = json.loads(capsys.readouterr().out, parse_constant=no_such_number)
    assert found == {"checkpoints": {"a": {"task": {"acc,none": None}}}}
    report = Report("speed", StageConfig(name="s"), 8, 1, {}, [], {"x": math.inf}, [])
    assert json.loads(report.json(), parse_constant=no_such_number)["ratios"] == {"x": None}
