"""Tasks of lm-evaluation-harness on one or more checkpoints, as a table and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from flm_megatron.config.schema import ParallelConfig
from flm_megatron.data.conversations.template import TELE_FLM, ChatTemplate
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint, open_evaluated
from flm_megatron.evaluation.harness.tasks import load_tasks, task_files
from flm_megatron.evaluation.session import Session, hold_session
from flm_megatron.json_text import json_document

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

Metrics = Mapping[str, object]
"""What a task has by `METRIC,FILTER`: numbers, and its name as `alias`."""


class Result(TypedDict):
    """Of what lm-evaluation-harness returns, what is read: metrics, and samples where they are asked for, by task."""

    results: Mapping[str, Metrics]
    samples: Mapping[str, Sequence[Mapping[str, object]]]


@dataclass(frozen=True)
class HarnessRequest:
    """Which tasks to run on which checkpoints; `tasks_folder` holds task YAML files of one's own.

    A `context` of none is the checkpoint's sequence length.
    """

    checkpoints: Sequence[Path]
    tasks: Sequence[str]
    tasks_folder: Path | None = None
    network: bool = False
    fewshot: int | None = None
    limit: int | None = None
    template: str | None = None
    """Chat template that questions are put into; none leaves them as they are."""
    context: int | None = None
    batch: int = 8
    json: Path | None = None
    samples: Path | None = None
    tokenizer: Path | None = None
    precision: str | None = None
    vocab_size: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def check_request(request: HarnessRequest) -> None:
    """Open every checkpoint and build every task before any process is started.

    Raises:
        RequestError: a checkpoint, tokenizer, layout or task that cannot be had; lm_eval is not installed.
    """
    from flm_megatron.checkpoint.sharding.layout import check_layout

    for checkpoint in request.checkpoints:
        evaluated = open_evaluated(checkpoint, request.tokenizer, request.vocab_size)
        check_layout(evaluated.model, request.parallel)
        ChatTemplate(request.template or TELE_FLM, evaluated.tokenizer)
    with task_files(request.tasks_folder, request.network):
        load_tasks(request.tasks, request.tasks_folder)


def evaluate(request: HarnessRequest) -> int:
    """On every rank of the layout: evaluate all checkpoints; rank 0 shows the result. Returns 0."""
    found: dict[str, Result] = {}
    for path in request.checkpoints:
        evaluated = open_evaluated(path, request.tokenizer, request.vocab_size)

        def lead(session: Session, evaluated: EvaluatedCheckpoint = evaluated) -> int:
            """On rank 0, with the session ready."""
            name = evaluated.name if evaluated.name not in found else str(evaluated.path)
            found[name] = _run(request, session, evaluated)
            return 0

        hold_session(evaluated, request.parallel, request.precision, request.batch, lead)
    if found:
        _show(request, found)
    return 0


@dataclass(frozen=True)
class Questions:
    """What lm-evaluation-harness asks: tasks by name, which the manager knows, or as built, and how.

    With `templated` each question is put into the chat template; with `samples` each answer is returned.
    """

    tasks: Sequence[str | Task]
    manager: TaskManager | None = None
    fewshot: int | None = None
    limit: int | None = None
    templated: bool = False
    samples: bool = False


def ask(questions: Questions, session: Session, context: int, template: ChatTemplate) -> Result:
    """What lm-evaluation-harness makes of the session's model, in contexts of at most that many tokens. On rank 0."""
    from lm_eval.evaluator import simple_evaluate

    from flm_megatron.evaluation.harness.model import HarnessModel

    with redirect_stdout(sys.stderr):  # what tasks print is no part of the result
        result = simple_evaluate(
            HarnessModel(session, context, template),
            tasks=list(questions.tasks),
            task_manager=questions.manager,
            num_fewshot=questions.fewshot,
            limit=questions.limit,
            apply_chat_template=questions.templated,
            log_samples=questions.samples,
            bootstrap_iters=1000,
        )
    assert result is not None
    return result


def _run(request: HarnessRequest, session: Session, evaluated: EvaluatedCheckpoint) -> Result:
    """What lm-evaluation-harness makes of one checkpoint. On rank 0 only."""
    template = ChatTemplate(request.template or TELE_FLM, evaluated.tokenizer)
    with task_files(request.tasks_folder, request.network):
        questions = Questions(
            request.tasks,
            load_tasks(request.tasks, request.tasks_folder),
            request.fewshot,
            request.limit,
            templated=request.template is not None,
            samples=request.samples is not None,
        )
        return ask(questions, session, evaluated.window(request.context), template)


def _show(request: HarnessRequest, found: Mapping[str, Result]) -> None:
    scores = {name: result["results"] for name, result in found.items()}
    text = json_document({"checkpoints": scores})
    if request.samples:
        _write_samples(request.samples, found)
    if request.json == Path("-"):
        print(text)
        return
    print("\n".join(table(scores)))
    if request.json:
        request.json.write_text(text + "\n", encoding="utf-8")


def table(scores: Mapping[str, Mapping[str, Metrics]]) -> list[str]:
    """A row for each task's metric with its standard error, a column for each checkpoint."""
    rows = dict.fromkeys(
        (task, key) for tasks in scores.values() for task, metrics in tasks.items() for key in _measured(metrics)
    )
    width = max((len(task) + len(key) + 1 for task, key in rows), default=0)
    columns = [max(18, len(name)) for name in scores]
    lines = [f"{'task metric':{width}} " + " ".join(f"{n:>{c}}" for n, c in zip(scores, columns, strict=True))]
    for task, key in rows:
        cells = [_cell(tasks.get(task, {}), key) for tasks in scores.values()]
        label = f"{task} {key.removesuffix(',none')}"
        lines.append(f"{label:{width}} " + " ".join(f"{x:>{c}}" for x, c in zip(cells, columns, strict=True)))
    return lines


def scores_of(results: Mapping[str, Metrics]) -> dict[str, float]:
    """The score of each task's metric under TASK/METRIC, with the name of its filter where it has one."""
    return {
        f"{task}/{key.removesuffix(',none')}": value
        for task, metrics in results.items()
        for key, value in _measured(metrics).items()
    }


def _measured(metrics: Metrics) -> dict[str, float]:
    """A task's metrics by `METRIC,FILTER`, without their standard errors."""
    return {key: value for key, value in metrics.items() if isinstance(value, float) and "_stderr" not in key}


def _cell(metrics: Metrics, key: str) -> str:
    if key not in metrics:
        return "-"
    metric, _, variant = key.partition(",")
    error = metrics.get(f"{metric}_stderr,{variant}")
    return f"{metrics[key]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _write_samples(path: Path, found: Mapping[str, Result]) -> None:
    """Every question with its answers, a JSON object in each line: what a judge, man or model, reads."""
    with path.open("w", encoding="utf-8") as out:
        for name, result in found.items():
            for task, samples in result["samples"].items():
                for sample in samples:
                    record = {
                        "checkpoint": name,
                        "task": task,
                        "doc": sample["doc"],
                        "target": sample["target"],
                        "answers": sample["filtered_resps"],
                    }
                    print(json.dumps(record, ensure_ascii=False, default=str), file=out)
