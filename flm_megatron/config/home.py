"""The fields of a run file that are paths, and `~` expanded in all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.paths import expanded
from flm_megatron.storage.cache.place import cache_root
from flm_megatron.url import is_url, name_of


def expand_paths(run: RunConfig, source: str) -> None:
    """Replace `~` in every path of the run, in place, so that the resolved run file holds none.

    Raises:
        Mistakes: paths that are empty, hold a NUL or name an unknown user; `source` names the run file.
    """
    mistakes = []
    for owner, name, place in _paths(run):
        try:
            setattr(owner, name, expanded(getattr(owner, name), place))
        except RequestError as error:
            mistakes.append(str(error))
    if run.output_url is not None and not is_url(run.output_url):
        mistakes.append(f"output_url {run.output_url} is no URL: give s3://BUCKET/PATH, and a folder as output")
    if mistakes:
        raise Mistakes(mistakes, source)
    _divide_output(run)


def _divide_output(run: RunConfig) -> None:
    """Where `output` is a URL, make it `output_url`, and `output` a folder of this machine."""
    if is_url(run.output):
        run.output_url = run.output.rstrip("/")
        name = hashlib.sha256(run.output_url.encode()).hexdigest()[:8]
        run.output = str(cache_root() / "runs" / f"{name_of(run.output_url)}-{name}")


def _paths(run: RunConfig) -> Iterator[tuple[object, str, str]]:
    """Section, field and dotted path of every path that is given."""
    fields: list[tuple[object, str, str]] = [
        (run, "output", "output"),
        (run, "output_url", "output_url"),
        (run, "tokenizer", "tokenizer"),
        (run.data, "cache", "data.cache"),
        (run.checkpoint, "initial", "checkpoint.initial"),
        (run.evaluation, "tasks_folder", "evaluation.tasks_folder"),
    ]
    fields += [(text, "path", f"evaluation.texts.{index}.path") for index, text in enumerate(run.evaluation.texts)]
    for split in ("train", "validation"):
        for index, source in enumerate(getattr(run.data, split)):
            fields.append((source, "path", f"data.{split}.{index}.path"))
    for index, stage in enumerate(run.stages):
        if stage.shrink is not None:
            fields.append((stage.shrink, "importance", f"stages.{index}.shrink.importance"))
    for index, tracker in enumerate(run.logging.trackers):
        fields.append((tracker, "folder", f"logging.trackers.{index}.folder"))
    if run.data.chat is not None:
        fields.append((run.data.chat, "template", "data.chat.template"))
    return (field for field in fields if getattr(field[0], field[1]) is not None)
