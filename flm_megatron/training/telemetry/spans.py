"""Spans for OpenTelemetry: stages, and in them steps (every N-th), saves, validations, loads and growths."""

from __future__ import annotations

import logging
import os
import threading

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.util.types import AttributeValue

from flm_megatron.config.schema import RunConfig
from flm_megatron.training.metrics.events import GrowthEvent, Line, RefusedEvent, SaveEvent, StepEvent, ValidationEvent
from flm_megatron.training.metrics.goodput import BeginLine, StepLine
from flm_megatron.training.metrics.goodput import Line as TimeLine
from flm_megatron.training.telemetry.observers import Observer, Span, warn

LAST_S = 5.0
"""Seconds that the end of a run waits for the collector."""
LOGGER = "opentelemetry"


class Spans(Observer):
    """Makes spans out of what the rank has done; the SDK's thread sends them, and drops those it cannot send."""

    def __init__(self, run: RunConfig, step_interval: int, exporter: SpanExporter) -> None:
        self.step_interval = step_interval
        self.provider = TracerProvider(resource=_resource(run), shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("flm_megatron")
        self.stage: trace.Span | None = None
        self.name = ""
        self.timed: StepLine | None = None
        self.growth: Span | None = None

    def span(self, span: Span) -> None:
        """A load becomes a span at once, a growth when its certificate is known."""
        self._begin(span.stage, span.began)
        if span.what == "growth":
            self.growth = span
        else:
            self._add(span.what, span.began, span.ended, {})

    def time(self, line: TimeLine) -> None:
        """Stalls become spans; a step waits for its numbers."""
        if isinstance(line, BeginLine):
            self._begin(line.stage, line.time)
        elif isinstance(line, StepLine):
            self.timed = line
        else:
            self._add(line.what, line.time - line.seconds, line.time, {})

    def line(self, line: Line) -> None:
        """Steps become spans with their numbers; what else there is to know becomes an event of the stage's span."""
        if isinstance(line, StepEvent | RefusedEvent):
            self._step(line)
        elif isinstance(line, GrowthEvent) and self.growth:
            self._add("growth", self.growth.began, self.growth.ended, _certified(line))
            self.growth = None
        elif isinstance(line, SaveEvent) and self.stage:
            self.stage.add_event("saved", {"flm.step": line.step, "flm.path": line.path})
        elif isinstance(line, ValidationEvent) and self.stage:
            self.stage.add_event("validated", {"flm.step": line.step, "flm.validation_loss": line.loss})

    def close(self) -> None:
        """End the stage's span, and give the collector a moment for what is left."""
        if self.stage:
            self.stage.end()
        last = threading.Thread(target=self.provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(LAST_S)

    def _begin(self, stage: str, began: float) -> None:
        """Begin the span of a stage, unless it is that one."""
        if stage == self.name:
            return
        if self.stage:
            self.stage.end()
        self.name = stage
        self.stage = self.tracer.start_span("stage", start_time=_ns(began), attributes={"flm.stage": stage})

    def _step(self, line: StepEvent | RefusedEvent) -> None:
        timed = self.timed
        if timed is None or timed.step != line.step or line.step % self.step_interval:
            return
        values: dict[str, AttributeValue] = {"flm.data_wait_s": timed.data_s, "flm.tokens": line.tokens}
        if isinstance(line, StepEvent):
            values |= {"flm.loss": line.loss, "flm.grad_norm": line.grad_norm, "flm.learning_rate": line.lr}
        else:
            values["flm.refused"] = line.reason
        self._add("step", timed.time - timed.seconds, timed.time, values, line.step)

    def _add(
        self, what: str, began: float, ended: float, values: dict[str, AttributeValue], step: int | None = None
    ) -> None:
        """A span that is over, below that of its stage."""
        context = trace.set_span_in_context(self.stage) if self.stage else None
        known = step if step is not None else self.timed.step if self.timed else 0
        attributes: dict[str, AttributeValue] = {"flm.stage": self.name, "flm.step": known}
        attributes |= values
        self.tracer.start_span(what, context, start_time=_ns(began), attributes=attributes).end(_ns(ended))


def exporter(endpoint: str | None) -> SpanExporter:
    """The SDK's exporter over HTTP, as the OTEL_* variables say; what it complains of is said once."""
    logger = logging.getLogger(LOGGER)
    logger.handlers, logger.propagate = [_Once()], False
    return OTLPSpanExporter(endpoint=endpoint)


class _Once(logging.Handler):
    """Passes on the first warning, for a collector that is away is complained of with every batch."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, if it is the first."""
        if record.levelno >= logging.WARNING and not self.said:
            self.said = True
            warn(f"logging.opentelemetry: {record.getMessage()}; spans may be lost, the run goes on")


def _resource(run: RunConfig) -> Resource:
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    service = {} if named else {"service.name": "flm_megatron"}
    return Resource.create({**service, "flm.run": run.name})


def _certified(line: GrowthEvent) -> dict[str, AttributeValue]:
    """The losses of a growth's certificate."""
    if line.certificate is None:
        return {"flm.change": line.change}
    last = line.certificate.comparisons[-1]
    return {"flm.change": line.change, "flm.loss_before": last.loss_before, "flm.loss_after": last.loss_after}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
