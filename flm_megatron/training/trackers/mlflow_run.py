"""Runs of MLflow: at a server, in a database, or in a local folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from flm_megatron.config.yaml_text import format_yaml
from flm_megatron.json_text import Json, JsonObject
from flm_megatron.training.trackers.tracker import Event, Point, Status, TrackedRun, Tracker
from flm_megatron.url import redacted

os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.10 on MLflow wants folders to be asked for
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

MOST_METRICS, MOST_PARAMS, LONGEST = 1000, 100, 500
"""What a request may hold, and the letters of a value or tag that every version takes."""
ENDED = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "killed": "KILLED"}


class MlflowTracker(Tracker):
    """A run of MLflow: run file as parameters and artifact, events as tags and as an artifact."""

    def __init__(self) -> None:
        self.client: MlflowClient | None = None
        self.id, self.events = "", Path()
        self.began, self.doubtful = time.time(), False

    def start(self, run: TrackedRun) -> str:
        """Begin the run in its experiment, or go on with it."""
        uri = run.options.uri or os.environ.get("MLFLOW_TRACKING_URI") or str(run.folder / "mlruns")
        if not urlsplit(uri).scheme:
            uri = Path(uri).absolute().as_uri()
        client = self.client = MlflowClient(tracking_uri=uri)
        self.events = run.events
        if run.id:
            self.id = run.id
            client.update_run(run.id, status="RUNNING")
        else:
            tags = {"flm.name": run.name, **dict.fromkeys(run.options.tags, "")}
            self.id = client.create_run(_experiment(client, run.options.project or run.name), tags=tags,
                                        run_name=run.name).info.run_id  # fmt: skip
            client.log_text(self.id, format_yaml(run.config), "run.yaml")
            params = [Param(name, text) for name, text in flat(run.config)]
            for first in range(0, len(params), MOST_PARAMS):
                client.log_batch(self.id, params=params[first : first + MOST_PARAMS])
        self.where = redacted(f"run {self.id} at {uri}")
        return self.id

    def points(self, points: Sequence[Point]) -> None:
        """Log all numbers in as few requests as the server takes; without those that it has, where that is in doubt."""
        assert self.client is not None, "`start` comes first"
        metrics = [
            Metric(name, value, int(1000 * point.time), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        if self.doubtful or any(point.time < self.began for point in points):
            metrics = self._not_there(metrics)
        self.doubtful = True
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[first : first + MOST_METRICS])
        self.doubtful = False

    def _not_there(self, metrics: Sequence[Metric]) -> list[Metric]:
        """Those that an attempt which was cut off has not logged: folders keep twice what they are told twice."""
        assert self.client is not None, "`start` comes first"
        there = {
            (each.key, each.step, each.timestamp)
            for name in {metric.key for metric in metrics}
            for each in self.client.get_metric_history(self.id, name)
        }
        return [metric for metric in metrics if (metric.key, metric.step, metric.timestamp) not in there]

    def event(self, event: Event) -> None:
        """Log the file of all events as an artifact, and tag the run with the newest of its kind."""
        assert self.client is not None, "`start` comes first"
        self.client.log_artifact(self.id, str(self.events))
        tag = RunTag(f"flm.{event.what}.{event.stage}", event.text[:LONGEST])
        self.client.log_batch(self.id, tags=[tag, RunTag("flm.stage", event.stage)])

    def finish(self, status: Status) -> None:
        """Say how the run ended."""
        if self.client is not None:
            self.client.set_terminated(self.id, ENDED[status])


def flat(config: JsonObject) -> Iterator[tuple[str, str]]:
    """Every field of a run file with its dotted path and its value as text; nulls and what is empty are left out."""

    def walk(value: Json, path: str) -> Iterator[tuple[str, str]]:
        """The fields below a path."""
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                yield from walk(inner, f"{path}.{key}" if path else str(key))
        elif value is not None:
            yield path, str(value)[:LONGEST]

    return walk(config, "")


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, made if it is new."""
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another run was first
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
