"""MLflow and Weights & Biases: what their own clients and readers find of a tracked run, and no secret in it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.config.schema import TrackerConfig
from flm_megatron.json_text import Json
from flm_megatron.training.metrics.events import GrowthEvent
from tests.support.trackers import CERTIFICATE, steps, track, tracked_run, two_stages, write_lines

SECRET = "correct-horse-battery"
BLOCK, HEADER, FULL, LAST = 2**15, 7, 1, 4


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the environment, as users have them."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the client of the test
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)


def files_with(folder: Path, text: str) -> list[Path]:
    """Files below a folder that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_mlflow_has_one_run_with_every_step_once(tmp_path: Path, secrets: None) -> None:
    mlflow = pytest.importorskip("mlflow")
    options = TrackerConfig(name="mlflow", project="growing", uri=str(tmp_path / "store"), tags=["x"])
    run = tracked_run(tmp_path, options)
    lines = [*two_stages()[:6], GrowthEvent("large", 0, 512, CERTIFICATE), *steps("large", [1, 2, 3], 512)]
    write_lines(tmp_path, lines)
    track(run, "stopped")
    write_lines(tmp_path, [*lines, *steps("large", [4], 512)])
    track(run)
    client = mlflow.tracking.MlflowClient((tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("growing")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(n, v) for n, v in enumerate([9, 8, 7, 6, 9, 8, 7, 6], 1)]
    assert found.data.metrics["growth/loss_after"] == 3.5 and found.data.metrics["tokens"] == 1024
    assert found.data.metrics["model/parameters"] > 0 and found.info.status == "FINISHED"
    assert found.data.params["stages.1.model.num_layers"] == "4" and "x" in found.data.tags
    assert found.data.tags["flm.growth.large"].startswith("growth into large: from ")
    events = Path(client.download_artifacts(found.info.run_id, "events.jsonl")).read_text().splitlines()
    assert [json.loads(row)["what"] for row in events] == ["stage", "save", "stage", "growth"]
    assert json.loads(events[3])["certificate"]["comparisons"][0]["loss_before"] == 3.0
    assert "num_layers: 4" in Path(client.download_artifacts(found.info.run_id, "run.yaml")).read_text()
    assert files_with(tmp_path, SECRET) == []


def test_mlflow_has_every_step_once_when_its_process_died_between_sending_and_noting(
    tmp_path: Path, secrets: None
) -> None:
    mlflow = pytest.importorskip("mlflow")
    name, store = "tests.support.dying_mlflow.DyingMlflow", tmp_path / "store"
    run = tracked_run(tmp_path, TrackerConfig(name=name, project="growing", uri=str(store)))
    write_lines(tmp_path, steps("small", [1, 2, 3]))
    track(run, "killed")
    write_lines(tmp_path, steps("small", [1, 2, 3, 4]))
    track(run)
    client = mlflow.tracking.MlflowClient(store.as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("growing").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(1, 9), (2, 8), (3, 7), (4, 6)]
    assert len({each.timestamp for each in history}) == 2


@pytest.mark.slow
def test_a_server_that_is_away_is_named_without_its_password(
    tmp_path: Path, secrets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_lines(tmp_path, two_stages())
    track(tracked_run(tmp_path, TrackerConfig(name="mlflow")))
    assert "WARNING: mlflow: MlflowException: " in (tmp_path / "log.txt").read_text()
    assert files_with(tmp_path, SECRET) == []


@pytest.mark.slow
def test_wandb_offline_holds_every_step_once_under_one_id(tmp_path: Path, secrets: None) -> None:
    pytest.importorskip("wandb")
    run = tracked_run(tmp_path, TrackerConfig(name="wandb", mode="offline", project="growing"))
    write_lines(tmp_path, two_stages())
    track(run, "stopped")
    write_lines(tmp_path, [*two_stages(), *steps("large", [4], 512)])
    track(run)
    files = sorted((tmp_path / "trackers" / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.HasField("run")]
    assert len(runs) == 2 and len({each.run_id for each in runs}) == 1 and runs[0].project == "growing"
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["stages"][1]["model"]["num_layers"] == 4
    rows = [row_values(record.history.item) for record in records if record.HasField("history")]
    told = [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert told == [(n, v) for n, v in enumerate([9, 8, 7, 6, 9, 8, 7, 6], 1)]
    summary = [row_values(record.summary.update) for record in records if record.HasField("summary")]
    assert any("events/growth/large" in row for row in summary)
    assert files_with(tmp_path, SECRET) == []


def row_values(items: Iterable[Any]) -> dict[str, Json]:
    """The values of a row of the history or the summary."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def wandb_records(path: Path) -> list[Any]:
    """The records of a `.wandb` file: messages of the library's own in blocks as LevelDB's logs have them."""
    messages = import_module("wandb.proto.wandb_internal_pb2")
    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at < len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            records.append(messages.Record.FromString(parts))
            parts = b""
    return records
