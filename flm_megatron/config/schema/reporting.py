"""To whom a run reports besides its own files: trackers, Prometheus, OpenTelemetry."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.settings import SETTINGS


@dataclass(config=SETTINGS)
class TrackerConfig:
    """An experiment tracker; in the run file its name alone stands for one with nothing else set."""

    name: str
    """`wandb`, `mlflow`, or PACKAGE.MODULE.CLASS of a subclass of `flm_megatron.training.trackers.Tracker`
    (docs/trackers.md)."""
    project: str | None = None
    """Project of Weights & Biases, experiment of MLflow; none means the run's name."""
    uri: str | None = None
    """Server, or for MLflow also a folder; without user and password, which belong into the environment. None means
    what the tracker's own variables say."""
    folder: str | None = None
    """Folder for the tracker's own files; none means one in the output folder."""
    mode: Literal["online", "offline"] = "online"
    """Offline: nothing leaves the machine until the tracker's own tool sends it (`wandb sync`)."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run."""
    exit_wait_s: int = 30
    """Seconds that the end of the run waits for it to send what is left; what is not sent then is sent when the run
    goes on, or by `flm track`."""


@dataclass(config=SETTINGS)
class PrometheusConfig:
    """An endpoint that Prometheus reads."""

    port: int = 9400
    """Port of the first rank; with `per_rank` every rank takes this plus its local rank."""
    address: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of this host."""
    per_rank: bool = False
    """Every rank answers, with its times and memory, not the first alone."""


@dataclass(config=SETTINGS)
class OpenTelemetryConfig:
    """Spans of steps, saves, loads, growths and validations, exported over OTLP as the OTEL_* variables say."""

    endpoint: str | None = None
    """URL of the collector's traces; none means what OTEL_EXPORTER_OTLP_ENDPOINT and its like say."""
    step_interval: int = 100
    """Every how many steps one becomes a span; saves, loads, growths and validations all do."""


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _switched(value: object) -> object:
    return {} if value is True else None if value is False else value


Tracker = Annotated[TrackerConfig, BeforeValidator(_named)]
"""A section, or the tracker's name alone."""
Prometheus = Annotated[PrometheusConfig | None, BeforeValidator(_switched)]
OpenTelemetry = Annotated[OpenTelemetryConfig | None, BeforeValidator(_switched)]
"""A section; true is one with nothing set, false none."""
