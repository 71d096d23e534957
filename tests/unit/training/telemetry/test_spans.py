"""Spans, as the SDK's exporter in memory gets them; a collector that is away or hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flm_megatron.config.schema import OpenTelemetryConfig
from flm_megatron.training.metrics.events import GrowthEvent, RefusedEvent, SaveEvent
from flm_megatron.training.metrics.goodput import Meter
from flm_megatron.training.metrics.log import MetricsLog
from flm_megatron.training.telemetry import Observers, spans, telemetry
from flm_megatron.training.telemetry.spans import Spans
from tests.support.trackers import CERTIFICATE, steps, tracked_run


def trained(tmp_path: Path, exporter: SpanExporter) -> None:
    """A stage that grows, loads, trains four steps and saves."""
    observers = Observers([Spans(tracked_run(tmp_path), 2, exporter)])
    with observers.spanning("growth", "large"):
        time.sleep(0.01)
    with observers.spanning("load", "large"):
        pass
    meter, log = Meter(None, observers), MetricsLog(tmp_path, False, ["small", "large"], "large", 0, observers)
    meter.begin(1, "large", 0)
    log.write(GrowthEvent("large", 0, 512, CERTIFICATE))
    for event in steps("large", [1, 2, 3], 512):
        meter.step(event.step or 0, 0.5, 0.25, applied=True)
        log.write(event)
    meter.step(4, 0.5, 0.0, applied=False)
    log.write(RefusedEvent("large", 4, 1024, "loss is nan", "skip", ()))
    with meter.stall("save"):
        pass
    log.write(SaveEvent("large", 4, 1024, "checkpoints/large/step_00000004"))
    log.close()
    observers.close()


def attributes(span: ReadableSpan) -> dict[str, object]:
    """A span's attributes."""
    return dict(span.attributes or {})


def test_spans_have_their_times_and_numbers_below_the_stage(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    trained(tmp_path, exporter)
    found = {(span.name, attributes(span).get("flm.step")): span for span in exporter.get_finished_spans()}
    assert set(found) == {("stage", None), ("growth", 0), ("load", 0), ("step", 2), ("step", 4), ("save", 4)}
    growth, step, stage = found["growth", 0], found["step", 2], found["stage", None]
    assert attributes(growth)["flm.loss_after"] == 3.5
    assert growth.end_time and growth.start_time and growth.end_time - growth.start_time >= 10_000_000
    assert attributes(step) == {
        "flm.stage": "large", "flm.step": 2, "flm.loss": 8.0, "flm.grad_norm": 0.5, "flm.learning_rate": 1e-3,
        "flm.tokens": 768, "flm.data_wait_s": 0.25,
    }  # fmt: skip
    assert attributes(found["step", 4])["flm.refused"] == "loss is nan"
    assert stage.context and all(span.parent and span.parent.span_id == stage.context.span_id
                                 for span in found.values() if span is not stage)  # fmt: skip
    assert [event.name for event in stage.events] == ["saved"] and stage.resource.attributes["flm.run"] == "a run"


def test_a_collector_that_hangs_holds_the_end_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class Hanging(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            released.wait(60)
            return SpanExportResult.FAILURE

    monkeypatch.setattr(spans, "LAST_S", 0.3)
    began = time.monotonic()
    trained(tmp_path, Hanging())
    assert time.monotonic() - began < 5
    released.set()


def test_a_collector_that_is_away_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:hunter22@127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    run = tracked_run(tmp_path)
    run.logging.opentelemetry = OpenTelemetryConfig(step_interval=1)
    began = time.monotonic()
    with telemetry(run, 0, 1, float) as observers:
        for _ in range(2):
            with observers.spanning("load", "small"):
                pass
    assert time.monotonic() - began < 10
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("WARNING: logging.opentelemetry: ") and "hunter22" not in lines[0]


def test_other_ranks_make_none(tmp_path: Path) -> None:
    run = tracked_run(tmp_path)
    run.logging.opentelemetry = OpenTelemetryConfig()
    with telemetry(run, 1, 2, float) as observers:
        assert not observers
