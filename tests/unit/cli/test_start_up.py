"""How fast the program starts, held against the interpreter's own start on the same machine at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flm_megatron.cli.main import COMMANDS

HEAVY = {"torch", "megatron", "numpy", "pydantic", "yaml", "matplotlib", "transformers", "sentencepiece"}
ALLOWED_S = 0.2
REPORT = "import json, sys\nbefore = set(sys.modules)\n{}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
HELP = """
from flm_megatron.cli.main import main
try:
    main({!r})
except SystemExit as done:
    assert done.code == 0
"""


def imported(code: str) -> set[str]:
    """Modules that `code` imports into a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", REPORT.format(code)], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    """The top-level packages of modules."""
    return {name.split(".")[0] for name in modules}


def processor_s(*arguments: str, times: int = 5) -> float:
    """Least processor time of a few runs of Python: other programs on the machine add little to it."""
    return min(_processor_s(arguments) for _ in range(times))


def _processor_s(arguments: tuple[str, ...]) -> float:
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("code", ["import flm_megatron", "import flm_megatron as flm; dir(flm); flm.__all__"])
def test_importing_the_package_imports_itself_alone(code: str) -> None:
    assert imported(code) == {"flm_megatron"}


def test_a_name_imports_what_it_needs_and_nothing_heavier() -> None:
    assert not packages(imported("import flm_megatron; flm_megatron.RequestError")) & HEAVY
    assert not packages(imported("import flm_megatron; flm_megatron.load_run")) & (HEAVY - {"pydantic", "yaml"})


def test_help_imports_nothing_heavy() -> None:
    found = imported(HELP.format(["--help"]))
    assert not packages(found) & HEAVY
    assert len(found) < 120, sorted(found)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_neither_torch_nor_the_engine(command: str) -> None:
    found = packages(imported(HELP.format([command, "--help"])))
    assert not found & {"torch", "megatron", "transformers", "matplotlib"}


def test_a_plan_needs_neither_torch_nor_the_engine() -> None:
    assert not packages(imported("import flm_megatron; flm_megatron.plan")) & {"torch", "megatron"}


@pytest.mark.parametrize("arguments", [("-c", "import flm_megatron"), ("-m", "flm_megatron.cli.main", "--help")])
def test_start_takes_little_more_than_the_interpreters(arguments: tuple[str, ...]) -> None:
    assert processor_s(*arguments) - processor_s("-c", "pass") < ALLOWED_S
