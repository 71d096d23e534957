"""What `make quickstart` says at its end: three commands that work."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from examples import quickstart
from flm_megatron.cli.main import whole_parser
from tests.support.runs import flm


def test_the_next_commands_are_such_that_the_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "last_checkpoints", lambda run: [Path(run) / "checkpoints/large/step_00000074"])
    commands = [shlex.split(command)[1:] for command in quickstart.next_commands()]
    assert [words[0] for words in commands] == ["status", "generate", "plan"]
    for words in commands:
        assert whole_parser().parse_args(words).command == words[0]
    plan = flm(*commands[-1], "--stages.0.model.vocab_size", "2048", "--stages.1.model.vocab_size", "2048",
               "--stages.2.model.vocab_size", "2048")  # fmt: skip
    assert plan.returncode == 0, plan.stderr
