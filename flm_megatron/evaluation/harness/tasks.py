"""Tasks of lm-evaluation-harness, taken from local files unless the network is allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.errors import RequestError, one_line

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

INSTALL = "lm_eval is not installed: pip install 'flm_megatron[eval]'"


@contextmanager
def task_files(folder: Path | None, network: bool) -> Iterator[None]:
    """While the block runs, nothing is fetched (unless `network`), and relative paths in tasks start at `folder`."""
    before = Path.cwd()
    if not network:
        _go_offline()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def _go_offline() -> None:
    """Make the libraries that would fetch say so instead, whether they are imported already or not."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise RequestError(INSTALL) from None
    datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def load_tasks(names: Sequence[str], folder: Path | None) -> TaskManager:
    """A task manager that knows `names`; every task is built once, to find out whether it can be. Inside `task_files`.

    Raises:
        RequestError: no such task, a task that needs the network or a file that is not there, or no lm_eval.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RequestError(INSTALL) from None
    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            own = f", {folder} has {', '.join(_own_tasks(folder)) or 'none'}" if folder else ""
            raise RequestError(f"there is no task {name!r}: lm_eval has none of that name{own}")
        _build(manager, name)
    return manager


def generating(task: Task) -> bool:
    """Whether a task lets the model write, rather than asking how likely given texts are."""
    return task.get_config("output_type") == "generate_until"


def _own_tasks(folder: Path) -> list[str]:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False).all_tasks


def _build(manager: TaskManager, name: str) -> None:
    try:
        manager.load([name])
    except Exception as error:
        if _wants_network(error):
            raise RequestError(
                f"task {name!r} needs the network for its data, which is not used: give a task over local files with "
                "--include-path, put the data into the cache first, or allow --network"
            ) from None
        if isinstance(error, FileNotFoundError):
            raise RequestError(f"task {name!r}: {' '.join(str(error).split())}") from None
        raise RequestError(one_line(f"task {name!r} cannot be built: {type(error).__name__}: {error}")) from error


def _wants_network(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, comes from a library that was not allowed to fetch."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError, DatasetNotFoundError)
    while error is not None:
        if isinstance(error, kinds):
            return True
        error = error.__cause__ or error.__context__
    return False
