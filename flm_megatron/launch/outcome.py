"""The last lines of a run: where its results are, and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

from flm_megatron.config.schema import RunConfig
from flm_megatron.distributed.signals import STOPPED
from flm_megatron.training.resume.start import checkpoint_store


def report_end(run: RunConfig, status: int) -> None:
    """Print the last lines, and add them to the run's log. For one process of the run."""
    text = "\n".join(last_words(run, status))
    with (Path(run.output) / "log.txt").open("a", encoding="utf-8") as log:
        print(text, file=log)
    print(text, flush=True)


def last_words(run: RunConfig, status: int) -> list[str]:
    """A line on how the run ended, then the newest checkpoint, the metrics and the next command."""
    stopped = status == STOPPED
    metrics = Path(run.output) / "metrics.jsonl"
    found = {
        "checkpoint": str(_newest(run) or "none yet"),
        "metrics": f"{metrics} (log.txt and run.yaml beside it)" if metrics.exists() else "none yet",
        "next": "the same command goes on" if stopped else f"flm report {shlex.quote(run.output)}",
    }
    ended = "stopped by a signal" if stopped else "trained to the end of its budget"
    return [f"{run.name}: {ended}", *(f"  {name:10} {value}" for name, value in found.items())]


def _newest(run: RunConfig) -> Path | None:
    """The newest checkpoint by name; it is not opened."""
    store = checkpoint_store(run)
    for stage in reversed(run.stages):
        if found := store.newest(stage.name):
            return found[0]
    return None
