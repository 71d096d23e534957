"""An endpoint with the newest numbers of a rank, made when Prometheus asks."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flm_megatron.config.schema import RunConfig
from flm_megatron.http_server import PLAIN, ReadHandler, ReadServer
from flm_megatron.training.metrics.events import Line, SaveEvent, StepEvent, ValidationEvent
from flm_megatron.training.metrics.goodput import Account, BeginLine, StepLine, read_account
from flm_megatron.training.metrics.goodput import Line as TimeLine
from flm_megatron.training.telemetry.observers import Observer

GIB = 2**30
PREFIX = "flm_"


class Exporter(Observer, Collector):
    """Keeps the newest lines, and serves them at a port until it is closed. Raises OSError where it cannot listen."""

    def __init__(self, run: RunConfig, rank: int, size: int, port: int, memory_gib: Callable[[], float]) -> None:
        self.run, self.rank, self.size, self.memory_gib = run, rank, size, memory_gib
        self.labels = {"run": run.name, "rank": str(rank)}
        self.begun: BeginLine | None = None
        self.timed: StepLine | None = None
        self.step: StepEvent | None = None
        self.validated: ValidationEvent | None = None
        self.saved: tuple[SaveEvent, float] | None = None
        self.train_s = self.data_s = 0.0
        self.refused = 0
        self.stalls_s: defaultdict[str, float] = defaultdict(float)
        self.account = read_account(Path(run.output)) if rank == 0 else Account()
        assert run.logging.prometheus is not None, "asked for"
        self.server = _server(self, run.logging.prometheus.address, port)
        threading.Thread(target=self.server.serve_forever, name="answers to Prometheus", daemon=True).start()

    def line(self, line: Line) -> None:
        """Keep the newest of its kind."""
        if isinstance(line, StepEvent):
            self.step = line
        elif isinstance(line, ValidationEvent):
            self.validated = line
        elif isinstance(line, SaveEvent):
            self.saved = (line, time.time())

    def time(self, line: TimeLine) -> None:
        """Add up where the time went."""
        self.account.add(line)
        if isinstance(line, BeginLine):
            self.begun, self.step, self.timed = line, None, None
        elif isinstance(line, StepLine):
            self.timed = line
            self.train_s, self.data_s = self.train_s + line.seconds, self.data_s + line.data_s
            self.refused += line.what == "refused"
        else:
            self.stalls_s[line.what] += line.seconds

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()

    def collect(self) -> Iterator[Metric]:
        """All that is known now."""
        yield from self._of_the_rank()
        if self.rank == 0:
            yield self._gauge(
                "goodput_ratio", "Share of the run's wall time in steps that count", self.account.total.share
            )
            yield from self._of_the_run()

    def _of_the_rank(self) -> Iterator[Metric]:
        """Times and memory, which every rank has."""
        if self.begun:
            yield self._gauge("stage", "Number of the stage, from 0", self.begun.index)
            yield self._gauge("stage_info", "1, with the name of the stage", 1, stage=self.begun.stage)
            grown = sum(stage.growth is not None for stage in self.run.stages[: self.begun.index + 1])
            yield self._gauge("growths", "Growths that the run has gone through", grown)
            step = self.timed.step if self.timed else self.begun.step
            yield self._gauge("step", "Steps of the stage that are done", step)
        if self.timed:
            yield self._gauge("step_seconds", "Time of the last step", self.timed.seconds)
            yield self._gauge("step_age_seconds", "Time since the last step ended", time.time() - self.timed.time)
        yield self._gauge("peak_memory_bytes", "Peak memory of the device", self.memory_gib() * GIB)
        yield self._counter("train_seconds", "Time in steps of this process", self.train_s)
        yield self._counter("data_wait_seconds", "Time that steps waited for their samples", self.data_s)
        yield self._counter("refused_steps", "Steps that were not applied", self.refused)
        yield self._many(
            "stall_seconds", "Time that training stood still", "kind", dict(self.stalls_s), CounterMetricFamily
        )

    def _of_the_run(self) -> Iterator[Metric]:
        """What the main rank knows of the whole run."""
        if step := self.step:
            values = {
                "tokens": ("Tokens of the run", step.tokens),
                "loss": ("Loss of the last step, nats per token", step.loss),
                "grad_norm": ("Norm of the gradient before clipping", step.grad_norm),
                "learning_rate": ("Learning rate of the last step", step.lr),
                "tokens_per_second": ("Tokens per second, all devices", step.tokens_per_s_per_device * self.size),
                "tflops_per_device": ("Model TFLOP/s per device", step.tflops_per_device),
                "mfu_ratio": ("Model FLOPs utilization", step.mfu),
                "eta_seconds": ("Time that the stage will still take", step.eta_s),
                "skipped_steps": ("Steps of the stage that were refused", step.skipped_steps),
            }
            for name, (text, value) in values.items():
                if value is not None:
                    yield self._gauge(name, text, value)
        if self.validated:
            yield self._many("validation_loss", "Validation loss, nats per token", "set", self.validated.by_set)
        if self.saved:
            event, at = self.saved
            yield self._gauge("checkpoint_step", "Step of the newest whole checkpoint", event.step)
            yield self._gauge("checkpoint_age_seconds", "Time since it was whole", time.time() - at)

    def _gauge(self, name: str, text: str, value: float, **more: str) -> Metric:
        labels = self.labels | more
        family = GaugeMetricFamily(PREFIX + name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _many(
        self,
        name: str,
        text: str,
        label: str,
        values: Mapping[str, float],
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily] = GaugeMetricFamily,
    ) -> Metric:
        """A number for each value of a label."""
        family = kind(PREFIX + name, text, labels=[*self.labels, label])
        for each, value in values.items():
            family.add_metric([*self.labels.values(), each], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family


def _server(collector: Collector, address: str, port: int) -> ReadServer:
    """A server of what a collector has. At an address that only this machine reaches it answers to its names alone."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)

    class Handler(ReadHandler):
        """Answers Prometheus, in the format that it asks for."""

        names = frozenset({"localhost", address.lower()}) if _is_loopback(address) else None

        def answer(self) -> None:
            """All that is known now."""
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                return self.send(HTTPStatus.NOT_FOUND, b"numbers are at /metrics\n", PLAIN)
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            return self.send(HTTPStatus.OK, encode(registry), kind)

    return ReadServer(address, port, Handler)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"
