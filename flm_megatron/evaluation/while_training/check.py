"""Whether what a run file wants evaluated while it trains can be had."""

from __future__ import annotations

import os
from pathlib import Path

from flm_megatron.config.schema import EvaluationConfig, RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.harness.tasks import generating, load_tasks, task_files
from flm_megatron.evaluation.perplexity.run import read_documents


def check_evaluation(run: RunConfig) -> None:
    """Read the texts and build the tasks that `run.evaluation` names; of a launcher's processes the first does it.

    Raises:
        RequestError: a text that is missing, empty or not UTF-8, a task that cannot be had, or one that generates text
            under a virtual pipeline; lm_eval is not installed.
    """
    asked = run.evaluation
    if os.environ.get("RANK", "0") != "0":
        return
    for text in asked.texts:
        read_documents(text.path)
    if asked.tasks:
        _check_tasks(asked, any(stage.parallel.virtual_pipeline > 1 for stage in run.stages))


def _check_tasks(asked: EvaluationConfig, interleaved: bool) -> None:
    folder = tasks_folder(asked)
    if folder is not None and not folder.is_dir():
        raise RequestError(f"evaluation.tasks_folder {folder} is not there: give a folder of task files")
    with task_files(folder, asked.network):
        manager = load_tasks(asked.tasks, folder)
        tasks = manager.load(asked.tasks)["tasks"] if interleaved else {}
        refused = [name for name, task in tasks.items() if generating(task)]
    if refused:
        raise RequestError(
            f"evaluation.tasks: {', '.join(refused)} generate text, which is not possible under a virtual pipeline: "
            "leave them out, or give parallel.virtual_pipeline 1"
        )


def tasks_folder(asked: EvaluationConfig) -> Path | None:
    """The folder of task files, as an absolute path."""
    return None if asked.tasks_folder is None else Path(asked.tasks_folder).absolute()
