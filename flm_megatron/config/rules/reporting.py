"""Rules on trackers, Prometheus and OpenTelemetry."""

from __future__ import annotations

from collections import Counter
from urllib.parse import urlsplit

from flm_megatron.config.ranges import LARGEST_COUNT, out_of_range
from flm_megatron.config.schema import RunConfig
from flm_megatron.url import is_url, shown

LARGEST_PORT, LARGEST_WAIT_S = 65535, 86400


def trackers_are_unique(run: RunConfig) -> list[str]:
    """Each tracker keeps what it sent under its name."""
    counts = Counter(tracker.name for tracker in run.logging.trackers)
    return [f"logging.trackers names {name!r} twice: give it once" for name, count in counts.items() if count > 1]


def addresses_hold_no_secrets(run: RunConfig) -> list[str]:
    """The run file is saved in every checkpoint, so it holds no user, password or key."""
    variables = {
        f"logging.trackers.{index}.uri": (tracker.uri, "the variables of the tracker, such as MLFLOW_TRACKING_PASSWORD")
        for index, tracker in enumerate(run.logging.trackers)
    }
    if run.logging.opentelemetry:
        variables["logging.opentelemetry.endpoint"] = (
            run.logging.opentelemetry.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS",
        )
    return [
        f"{place} holds a user, password or key, which would be saved with the run: give it by {instead}"
        for place, (url, instead) in variables.items()
        if url is not None and is_url(url) and shown(url) != url
    ]


def endpoint_is_a_url(run: RunConfig) -> str | None:
    """Traces go over HTTP."""
    wanted = run.logging.opentelemetry
    if wanted is None or wanted.endpoint is None or urlsplit(wanted.endpoint).scheme in ("http", "https"):
        return None
    return (
        f"logging.opentelemetry.endpoint {wanted.endpoint!r:.80} is no URL of a collector: give one such as "
        "http://localhost:4318/v1/traces"
    )


def reporting_is_bounded(run: RunConfig) -> list[str]:
    """Ports, waits and intervals make sense."""
    logging = run.logging
    values: dict[str, tuple[int | None, int, int]] = {
        f"logging.trackers.{index}.exit_wait_s": (tracker.exit_wait_s, 1, LARGEST_WAIT_S)
        for index, tracker in enumerate(logging.trackers)
    }
    if logging.prometheus:
        values["logging.prometheus.port"] = (logging.prometheus.port, 1, LARGEST_PORT)
    if logging.opentelemetry:
        values["logging.opentelemetry.step_interval"] = (logging.opentelemetry.step_interval, 1, LARGEST_COUNT)
    return out_of_range(values)


def url_interval_is_bounded(run: RunConfig) -> str | None:
    """A store is asked now and then, not all the time."""
    seconds = run.output_url_interval_s
    if 0.1 <= seconds <= LARGEST_WAIT_S:
        return None
    return f"output_url_interval_s is {seconds:g}: give seconds from 0.1 to {LARGEST_WAIT_S}"


REPORTING_RULES = (
    trackers_are_unique,
    addresses_hold_no_secrets,
    endpoint_is_a_url,
    reporting_is_bounded,
    url_interval_is_bounded,
)
