"""A run of two stages that grows, seen by MLflow, Prometheus and an OpenTelemetry collector while it trains."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path

import pytest

from flm_megatron.training.metrics.events import SaveEvent, StepEvent, read_events
from tests.support.runs import flm
from tests.support.trackers import free_port

pytestmark = pytest.mark.slow

RUN = """
name: watched
output: {output}
tokenizer: {data}/tokenizer.model
data:
  sequence_length: 32
  train: [{{path: {data}/train}}]
  validation: [{{path: {data}/validation}}]
defaults:
  global_batch: 4
  optimizer: {{lr: 3.0e-3, min_lr: 1.0e-3}}
  validation: {{interval_steps: 8, samples: 4}}
stages:
  - name: small
    model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4}}
    parallel: {{tensor: 2}}
    tokens: 2048
  - name: big
    model: {{num_layers: 3, hidden_size: 32, ffn_hidden_size: 96, num_attention_heads: 4}}
    tokens: 2048
    growth: {{}}
checkpoint: {{interval_steps: 8, keep_last: 9}}
logging:
  trackers: [{{name: mlflow, uri: {output}/store}}]
  prometheus: {{port: {port}}}
  opentelemetry: {{endpoint: "http://127.0.0.1:{collector}/v1/traces", step_interval: 4}}
"""


@contextmanager
def scraping(port: int) -> Iterator[list[str]]:
    """Pages of the endpoint, again and again."""
    pages: list[str] = []
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(0.01):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                pages.append(answer.read().decode())

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield pages
    finally:
        over.set()
        thread.join(10)


@contextmanager
def collecting(port: int) -> Iterator[list[bytes]]:
    """What a collector of traces is sent."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", port), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield bodies
    finally:
        server.shutdown()
        server.server_close()


def test_everybody_sees_the_run_and_its_growth(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    mlflow, source, port, collector = pytest.importorskip("mlflow"), tmp_path / "run.yaml", free_port(), free_port()
    output = tmp_path / "out"
    source.write_text(RUN.format(data=data, output=output, port=port, collector=collector))
    with collecting(collector) as bodies, scraping(port) as pages:
        first = flm("train", source, "--stage", "small")
        second = flm("train", source)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    steps = read_events(output, StepEvent)

    client = mlflow.tracking.MlflowClient((output / "store").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("watched").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(n, step.loss) for n, step in enumerate(steps, 1)]
    assert len(steps) == 32 and run.info.status == "FINISHED" and "growth/loss_after" in run.data.metrics
    assert run.data.metrics["validation/loss"] > 0 and run.data.tags["flm.growth.big"].startswith("growth into big: ")
    assert run.data.tags["flm.save.big"] == "checkpoints/big/step_00000016"

    numbers = {name: set(values) for name, values in by_name(pages).items()}
    assert numbers["flm_stage"] == {0.0, 1.0} and numbers["flm_growths"] == {0.0, 1.0}
    losses = {step.loss for step in steps}
    assert numbers["flm_loss"] <= losses and len(numbers["flm_loss"]) > 4
    assert 0 < max(numbers["flm_goodput_ratio"]) < 1 and max(numbers["flm_peak_memory_bytes"]) > 0

    names = spans(bodies)
    assert names.count("growth") == 1 and names.count("stage") == 2 and names.count("step") == 2 * 16 // 4
    assert names.count("validation") == 4 and names.count("save") >= 4 and "load" in names
    assert [event.path for event in read_events(output, SaveEvent)] == [
        f"checkpoints/{stage}/step_{step:08d}" for stage in ("small", "big") for step in (8, 16)
    ]


def by_name(pages: list[str]) -> dict[str, list[float]]:
    """All values that were ever scraped, by name."""
    parser = import_module("prometheus_client.parser")
    found: dict[str, list[float]] = {}
    for page in pages:
        for family in parser.text_string_to_metric_families(page):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample.value)
    return found


def spans(bodies: list[bytes]) -> list[str]:
    """Names of the spans in what was sent."""
    service = import_module("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    requests = [service.ExportTraceServiceRequest.FromString(body) for body in bodies]
    return [
        span.name
        for request in requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def test_a_tracker_that_hangs_leaves_losses_and_time_as_they_were(data: Path, tmp_path: Path) -> None:
    ran = {}
    for name, tracker in (
        ("none", "[]"),
        ("hanging", "[{name: tests.support.trackers.Hanging_start, exit_wait_s: 1}]"),
    ):
        source = tmp_path / f"{name}.yaml"
        source.write_text(RUN.format(data=data, output=tmp_path / name, port=free_port(), collector=9))
        began = time.monotonic()
        off = ("--logging.prometheus", "null", "--logging.opentelemetry", "null", "--logging.trackers", tracker)
        assert flm("train", source, "--stage", "small", *off).returncode == 0
        ran[name] = ([step.loss for step in read_events(tmp_path / name, StepEvent)], time.monotonic() - began)
    assert ran["none"][0] == ran["hanging"][0]
    assert ran["hanging"][1] < ran["none"][1] + 15
