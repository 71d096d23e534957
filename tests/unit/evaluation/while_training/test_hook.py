"""What a task does to the process that trains, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flm_megatron.config.schema import EvaluationConfig
from flm_megatron.evaluation.while_training import hook
from flm_megatron.evaluation.while_training.hook import Evaluation, Found


class Empty:
    """A session without prompts, and a tokenizer that is not used."""

    def generate(self, requests: list[Any]) -> list[Any]:
        """None."""
        assert not requests
        return []


@pytest.mark.parametrize("error", [SystemExit("the end\nof it"), ValueError("the end\nof it" + "x" * 10**6)])
def test_whatever_a_task_raises_is_one_short_line(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def asked(*args: object) -> None:
        """A task that goes wrong."""
        raise error

    monkeypatch.setattr(hook, "ask", asked)
    monkeypatch.setattr(hook, "ChatTemplate", lambda *args: None)
    evaluation = cast(Any, object.__new__(Evaluation))
    evaluation.asked, evaluation._tokenizer, evaluation._tasks = EvaluationConfig(tasks=["t"]), Empty(), ["t"]
    said = list[str]()
    trainer = SimpleNamespace(log=SimpleNamespace(say=said.append))
    evaluation._lead(Empty(), trainer, 32, found := Found())
    (line,) = said
    assert line.startswith(f"WARNING: tasks are not evaluated: {type(error).__name__}: the end\\nof it")
    assert "\n" not in line and len(line) < 1200 and found == Found()
